"""Forget one person from an ensemble, and prove it.

    python examples/forget_one_person.py runs/one-person

Needs about two minutes on two CPU cores. Cells (`# %%`) run one by one in an editor that knows them.
"""

# %% Four models, each trained on its own quarter of a hundred fictional people.
import sys
from pathlib import Path

from jaxforget.data import fictional
from jaxforget.data.sources import Record
from jaxforget.metrics.language import language_metrics
from jaxforget.sisa.deletion import ask, serve, verify
from jaxforget.sisa.ensemble import Ensemble, locked
from jaxforget.sisa.scoring import ensemble_token_scores
from train import sisa

directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/one-person")
if not directory.exists():
    sisa.run(sisa.Config(out=directory))
people = fictional.generate(fictional.FictionalConfig())
name = people["forget"][0].fields["person"]
person = [record for record in people["forget"] if record.fields["person"] == name]


# %% What does the vote know? Loss in nats a token, about the person and about people nobody was trained on.
def loss(ensemble: Ensemble, records: list[Record]) -> float:
    members = [ensemble.params(shard) for shard in ensemble.final_keys()]
    examples = ensemble.encode(records)
    scores = ensemble_token_scores(ensemble.model, members, examples, "mean_probability", ensemble.weights())
    return language_metrics(scores)["nll"]


with Ensemble(directory) as ensemble:
    before, never = loss(ensemble, person), loss(ensemble, people["approximate"])

# %% Delete every record of the person. Only the stages that had read one are trained again.
with Ensemble(directory) as ensemble, locked(directory, wait=True, tell=print):
    ensemble.ledger.receive(ask(ensemble, [record.id for record in person], with_duplicates=True).new)
    (receipt,) = serve(ensemble)
    after = loss(ensemble, person)

# %% Proof one: training everything from scratch without the person gives the same models, bit for bit.
with Ensemble(directory) as ensemble:
    checks = verify(ensemble)
assert all(check.same for check in checks)

# %% Proof two: no file of the ensemble still holds the name.
holding = [path for path in directory.rglob("*") if path.is_file() and name.encode() in path.read_bytes()]
assert not holding, holding

print(f"{name}: loss {before:.2f} before, {after:.2f} after; people nobody was trained on: {never:.2f}")
print(f"{receipt['stages_retrained']} stages trained again, {receipt['examples_revisited']} examples revisited of "
      f"{receipt['examples_of_full_retraining']}; {len(checks)} of {len(checks)} stages equal training without "
      f"{name}; no file holds the name")  # fmt: skip
