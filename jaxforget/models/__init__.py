"""Language models as pure functions: Hugging Face directories in and out, logits, generation.

FAMILIES maps a Hugging Face model_type to the file that implements it. A family file holds its `Config`, its
modules `Top` and `Block`, and `keys`, the table of Hugging Face names. Adding a family is one file and one
row.
"""

from jaxforget.models import gpt2, llama
from jaxforget.models.generate import generate
from jaxforget.models.hub import load, resolve, save
from jaxforget.models.model import Cache, Model, Params

FAMILIES = {"gpt2": gpt2, "llama": llama, "mistral": llama, "qwen2": llama}

__all__ = ["FAMILIES", "Cache", "Model", "Params", "generate", "load", "resolve", "save"]
