"""Methods, parameters and keys of any mergekit version that are not supported here."""

METHODS = frozenset(
    (
        *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "core_space", "della", "della_linear", "karcher"),
        *("model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl"),
    )
)

# Read by one method or another, or found in published configurations though no method reads them.
PARAMETERS = frozenset(
    (
        *("allow_negative_weights", "alpha", "density", "embed_slerp", "eps", "epsilon", "filter_wise", "gamma"),
        *("int8_mask", "lambda", "max_iter", "normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise"),
        *("r", "rescale", "scale", "select_topk", "smooth", "t", "tol", "weight"),
    )
)
SILENT = frozenset({"int8_mask"})  # saves memory, and does not change the result

# Keys of a configuration that are read.
KEYS = ("name", "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")

UNSUPPORTED = {
    "slices": "putting a model together from layers of others is not supported: list whole models under models",
    "modules": "merging the modules of a model apart is not supported: list whole models under models",
    "tokenizer_source": "tokenizers are not merged: the base model's, or the first model's, is kept",
    "tokenizer": "tokenizers are not merged: the base model's, or the first model's, is kept",
    "chat_template": "not supported: the base model's, or the first model's, is kept",
}
