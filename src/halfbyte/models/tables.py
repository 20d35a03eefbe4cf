"""The architectures that have a table. A new one is an entry here and a tiny model in the tests.

A link stands here only where moving a scale is exact: no norm, softmax or curved activation between writer and readers,
and nobody else reads the writer. So norms that also feed the residual stream (post-norm blocks) have none.
Norms of single queries and keys (Qwen3, Gemma3) come after the projections and do not matter to the norm before them.
"""

from halfbyte.models.architecture import Architecture, Link, Rows

ATTENTION = (
    Link("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Link("self_attn.v_proj", ("self_attn.o_proj",), Rows.VALUES),
)

LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    links=(
        *ATTENTION,
        Link("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Link("mlp.up_proj", ("mlp.down_proj",)),
    ),
)

GEMMA = Architecture(
    model_types=("gemma",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    links=LLAMA.links,
    norm_offset=1.0,
)

# post_attention_layernorm and post_feedforward_layernorm normalise what the branches write: no scale passes them.
GEMMA2 = Architecture(
    model_types=("gemma2", "gemma3_text"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    fixed_stream="norms scale what attention and feed-forward part add to it, channel by channel",
    links=(
        *ATTENTION,
        Link("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Link("mlp.up_proj", ("mlp.down_proj",)),
    ),
    norm_offset=1.0,
)

PHI3 = Architecture(
    model_types=("phi3",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj"),
    links=(
        Link("input_layernorm", ("self_attn.qkv_proj",)),
        Link("self_attn.qkv_proj", ("self_attn.o_proj",), Rows.VALUES),
        Link("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Link("mlp.gate_up_proj", ("mlp.down_proj",), Rows.LAST_HALF),
    ),
)

# The 350m has its norms after the residual sum (and no final norm); Galactica has this skeleton with a GELU.
OPT = Architecture(
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    writers=("self_attn.out_proj", "fc2"),
    links=(
        Link(
            "self_attn_layer_norm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            when={"do_layer_norm_before": True},
        ),
        Link("self_attn.v_proj", ("self_attn.out_proj",), Rows.VALUES),
        Link("final_layer_norm", ("fc1",), when={"do_layer_norm_before": True}),
        Link("fc1", ("fc2",), through="activation_fn"),
    ),
)

GPT2 = Architecture(
    model_types=("gpt2",),
    blocks="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    final_norm="transformer.ln_f",
    head="lm_head",
    writers=("attn.c_proj", "mlp.c_proj"),
    links=(
        Link("ln_1", ("attn.c_attn",)),
        Link("attn.c_attn", ("attn.c_proj",), Rows.VALUES),
        Link("ln_2", ("mlp.c_fc",)),
        Link("mlp.c_fc", ("mlp.c_proj",), through="mlp.act"),
    ),
)

GPTJ = Architecture(
    model_types=("gptj",),
    blocks="transformer.h",
    embeddings=("transformer.wte",),
    final_norm="transformer.ln_f",
    head="lm_head",
    writers=("attn.out_proj", "mlp.fc_out"),
    links=(
        Link("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        Link("attn.v_proj", ("attn.out_proj",), Rows.VALUES),
        Link("mlp.fc_in", ("mlp.fc_out",), through="mlp.act"),
    ),
)

# Parallel and serial residuals alike: each norm feeds one branch and nothing else.
GPT_NEOX = Architecture(
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    writers=("attention.dense", "mlp.dense_4h_to_h"),
    links=(
        Link("input_layernorm", ("attention.query_key_value",)),
        Link("attention.query_key_value", ("attention.dense",), Rows.VALUES_PER_HEAD),
        Link("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        Link("mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), through="mlp.act"),
    ),
    outer_disk_names={"lm_head": "embed_out"},
)

BLOOM = Architecture(
    model_types=("bloom",),
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
    final_norm="transformer.ln_f",
    head="lm_head",
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    fixed_stream="a norm after the embedding scales it, channel by channel",
    links=(
        Link(
            "input_layernorm",
            ("self_attention.query_key_value",),
            when={"apply_residual_connection_post_layernorm": False},
        ),
        Link("self_attention.query_key_value", ("self_attention.dense",), Rows.VALUES_PER_HEAD),
        Link(
            "post_attention_layernorm",
            ("mlp.dense_h_to_4h",),
            when={"apply_residual_connection_post_layernorm": False},
        ),
    ),
)

# One norm for both branches (7B), one per branch (40B, 180B), or serial branches (the RW models).
FALCON = Architecture(
    model_types=("falcon",),
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings",),
    final_norm="transformer.ln_f",
    head="lm_head",
    writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    links=(
        Link(
            "input_layernorm",
            ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            when={"config.parallel_attn": True},
            optional=True,
        ),
        Link("input_layernorm", ("self_attention.query_key_value",), when={"config.parallel_attn": False}),
        Link("ln_attn", ("self_attention.query_key_value",), optional=True),
        Link("ln_mlp", ("mlp.dense_h_to_4h",), optional=True),
        Link("post_attention_layernorm", ("mlp.dense_h_to_4h",), optional=True),
        Link("self_attention.query_key_value", ("self_attention.dense",), Rows.VALUES_PER_HEAD),
        Link("mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), through="mlp.act"),
    ),
)

# The router reads the same norm: left out, it would send tokens to other experts.
MIXTRAL = Architecture(
    model_types=("mixtral",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    links=(
        *ATTENTION,
        Link("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
        Link("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    disk_names={
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
        "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
        "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
    },
)

# Some blocks are dense (`mlp_only_layers`, `decoder_sparse_step`).
DENSE_OR_SPARSE = (
    Link("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), optional=True),
    Link("mlp.up_proj", ("mlp.down_proj",), optional=True),
    Link("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), optional=True),
)

QWEN2_MOE = Architecture(
    model_types=("qwen2_moe",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj", "mlp.shared_expert.down_proj"),
    links=(
        *ATTENTION,
        Link(
            "post_attention_layernorm",
            (
                "mlp.gate",
                "mlp.experts.*.gate_proj",
                "mlp.experts.*.up_proj",
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert_gate",
            ),
            optional=True,
        ),
        Link("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",), optional=True),
        *DENSE_OR_SPARSE,
    ),
)

QWEN3_MOE = Architecture(
    model_types=("qwen3_moe",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    links=(
        *ATTENTION,
        Link(
            "post_attention_layernorm",
            ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
            optional=True,
        ),
        *DENSE_OR_SPARSE,
    ),
)

# Each norm comes after its residual sum and feeds the next one: only the values are free.
BERT = Architecture(
    model_types=("bert",),
    blocks="bert.encoder.layer",
    embeddings=(
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        "bert.embeddings.LayerNorm",
    ),
    final_norm=None,
    head="cls.predictions.decoder",
    writers=("attention.output.dense", "output.dense"),
    fixed_stream="a norm after each sum scales it, channel by channel",
    links=(
        Link("attention.self.value", ("attention.output.dense",), Rows.VALUES),
        Link("intermediate.dense", ("output.dense",), through="intermediate.intermediate_act_fn"),
    ),
)

TABLES = (
    LLAMA,
    GEMMA,
    GEMMA2,
    PHI3,
    OPT,
    GPT2,
    GPTJ,
    GPT_NEOX,
    BLOOM,
    FALCON,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    BERT,
)

ARCHITECTURES: dict[str, Architecture] = {name: table for table in TABLES for name in table.model_types}


def architecture_of(model_type: str) -> Architecture | None:
    """The table of a `config.model_type`; None where there is none, and so no links are known."""
    return ARCHITECTURES.get(model_type)
