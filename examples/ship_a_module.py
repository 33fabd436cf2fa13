"""Train a debiasing module, ship it as one small file, and switch it on per request.

    python examples/ship_a_module.py runs/module

Needs about a minute on two CPU cores. Cells (`# %%`) run one by one in an editor that knows them.
"""

# %% Train a classifier of reviews and a module for each attribute that its features tell.
import dataclasses
import sys
from pathlib import Path

import numpy as np

from jaxforget.data.tokens import load_tokenizer
from jaxforget.debiasing.data import generated
from jaxforget.debiasing.modules import inspect, load_module
from jaxforget.debiasing.serving import Modular
from jaxforget.models import hub
from train import debias

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/module")
if not directory.exists():
    debias.run(dataclasses.replace(debias.default(), out=directory))

# %% What is shipped: the classifier, which anyone may have already, and one file for each attribute.
core, files = directory / "core", sorted((directory / "modules").glob("*.safetensors"))
model, params = hub.load(core)
modules = {file.stem: load_module(file) for file in files}
for name, module in modules.items():
    about = inspect(module)
    print(f"{name}: {about['nonzeros']:,} of {about['size']:,} parameters, {about['bytes']:,} bytes")

# %% Serve: every request names the attributes that its answer must not depend on; one compiled program for all mixes.
modular = Modular(model, params, modules)
tokenizer = load_tokenizer(core)
texts = [record.text for record in generated(3, seed=1)]
encoded = tokenizer(texts, padding=True, truncation=True, max_length=model.max_length)
tokens = np.asarray(encoded["input_ids"], np.int32)
batch = {"tokens": tokens, "length": np.asarray(encoded["attention_mask"], np.int32).sum(axis=1, dtype=np.int32)}
first = next(iter(modules))
print(modular.mixed(batch, [[], [first], list(modules)]))

# %% Off is the classifier itself, bit for bit, whatever was on before.
np.testing.assert_array_equal(modular.logits(batch), Modular(model, params, {}).logits(batch))
