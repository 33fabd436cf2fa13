"""Language models as pure functions: Hugging Face directories in and out, logits, generation.

FAMILIES maps a Hugging Face model_type to the file that implements it, which `family_of` imports. A family file holds
its `Config`, its modules `Top` and `Block`, and `keys`, the table of Hugging Face names. Adding a family is one file
and one row.
"""

from jaxforget.models.generate import generate
from jaxforget.models.hub import load, resolve, save
from jaxforget.models.model import Cache, Model, Params, family_of

FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "bert": "bert",
    "roberta": "roberta",
    "distilbert": "distilbert",
    "opt": "opt",
    "gpt_neox": "gpt_neox",
    "t5": "t5",
}

__all__ = ["FAMILIES", "Cache", "Model", "Params", "family_of", "generate", "load", "resolve", "save"]
