"""The methods, one file each. To add one: its file, its line here, its test, its page in docs/."""

from halfbyte.methods.awq import AWQ
from halfbyte.methods.fptq import FPTQ
from halfbyte.methods.gptq import GPTQ
from halfbyte.methods.lkd import LKD
from halfbyte.methods.omniquant import OmniQuant
from halfbyte.methods.quarot import QuaRot
from halfbyte.methods.rtn import RTN
from halfbyte.methods.smoothquant import SmoothQuant
from halfbyte.methods.wkv import WKV
from halfbyte.methods.wkvquant import WKVQuant

METHODS = {
    "awq": AWQ,
    "fptq": FPTQ,
    "gptq": GPTQ,
    "lkd": LKD,
    "omniquant": OmniQuant,
    "quarot": QuaRot,
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "wkv": WKV,
    "wkvquant": WKVQuant,
}
