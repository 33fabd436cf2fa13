"""From files to arrays: sources (records), tokens (arrays), sampling (order), fictional (built-in corpus)."""

from jaxforget.data.fictional import FictionalConfig, generate, tokenizer_texts, write
from jaxforget.data.sampling import hash64, hash_int, id_keys, order
from jaxforget.data.sources import Record, content_id, read_records
from jaxforget.data.tokens import Examples, check_vocabulary, concatenate, load_tokenizer, tokenize, train_tokenizer

__all__ = [
    "Examples",
    "FictionalConfig",
    "Record",
    "check_vocabulary",
    "concatenate",
    "content_id",
    "generate",
    "hash64",
    "hash_int",
    "id_keys",
    "load_tokenizer",
    "order",
    "read_records",
    "tokenize",
    "tokenizer_texts",
    "train_tokenizer",
    "write",
]
