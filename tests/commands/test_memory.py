"""benchmarks.memory: sizes in closed form, what is sent against the prediction, and that no weight is made."""

import json
from unittest import mock

import pages
import pytest
import running

import benchmarks.memory as memory
from jaxforget.models import Model
from jaxforget.training import cost

D, F, V, LAYERS = 64, 160, 256, 2
TINY = {"model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "vocab_size": V, "max_position_embeddings": 64,
        "tie_word_embeddings": False}  # fmt: skip
W = 2 * V * D + D + LAYERS * (4 * D * D + 3 * D * F + 2 * D)
NORMS = D * (1 + 2 * LAYERS)  # whole on every device
FLAGS = ("--length", 32, "--compute.dtype", "float32")


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("yi-6b", 6_061_035_520), ("llama-3-8b", 8_030_261_248),
])  # fmt: skip
def test_the_models_have_their_published_sizes(name, count):
    assert cost.parameters(memory.read_model(name, memory.Config())) == count


def test_one_device_holds_everything(in_process, tiny):
    with mock.patch.object(Model, "init", side_effect=AssertionError("weights were made")):
        out = in_process(memory, "out", "--model-config", tiny, *FLAGS, "--methods", "plain", "ascent_kl", "lora").out
    plain, kl, lora = running.results(out)["results"]
    adapters = LAYERS * 2 * 8 * (D + D)  # of q and v, rank 8
    for row, beside, moving in ((plain, 0, W), (kl, W, W), (lora, 0, adapters)):
        frozen = W if row is lora else 0
        assert round(row["parameters_gb"] * 1e9) == 4 * (moving + frozen), row["name"]
        assert round(row["beside_gb"] * 1e9) == 4 * beside and round(row["gradients_gb"] * 1e9) == 4 * moving
        assert 0 <= round(row["optimizer_gb"] * 1e9) - 8 * moving < 64  # Adam's two moments, and counters
        held = sum(row[f"{part}_gb"] for part in ("parameters", "optimizer", "beside"))
        assert 0 < (row["arguments_gb"] - held) * 1e9 < 2000  # a batch of one row, and the key
        assert 0 < row["results_gb"] - row["donated_gb"] < 1e-6  # the state lies where it lay; metrics come out
        assert row["peak_gb"] == pytest.approx(
            row["arguments_gb"] + row["results_gb"] - row["donated_gb"] + row["temporary_gb"]
        )
        assert row["temporary_gb"] > row["gradients_gb"] and row["sent_gb"] == 0
    assert lora["peak_gb"] < plain["peak_gb"] < kl["peak_gb"]
    assert pages.check((out / "report.html").read_text()).tables


@pytest.mark.slow
def test_what_meshes_hold_and_send(tmp_path, tiny):
    meshes = ("data=4", "fsdp=4", "tensor=4")
    running.run("benchmarks.memory", "--model-config", tiny, *FLAGS, "--methods", "plain", "sisa", "--meshes", *meshes,
                "--out", tmp_path / "out")  # fmt: skip
    rows = {(row["method"], row["mesh"]): row for row in running.results(tmp_path / "out")["results"]}
    whole, cut = 4 * W, 4 * ((W - NORMS) / 4 + NORMS)
    for mesh, size in zip(meshes, (whole, cut, cut), strict=True):
        row, axis = rows["plain", mesh], mesh.partition("=")[0]
        assert round(row["parameters_gb"] * 1e9) == size and 0 <= round(row["optimizer_gb"] * 1e9) - 2 * size < 64
        assert list(row["sent_by_axis_gb"]) == list(row["predicted_sent_by_axis_gb"]) == [axis]
        # Gradients are all that data sends. A CPU's program sums those of fsdp whole, where others scatter them: up to
        # 4/3 of the bytes. The softmax over a cut vocabulary, some of what tensor sends, is left out.
        low, high = {"data": (1.0, 1.01), "fsdp": (1.0, 1.4), "tensor": (0.85, 1.15)}[axis]
        assert low <= row["sent_gb"] / row["predicted_sent_gb"] <= high, mesh
    members = rows["sisa", "member=4"]  # one member on each device
    assert members["sent_by_axis_gb"] == members["predicted_sent_by_axis_gb"] == {}
    assert round(members["parameters_gb"] * 1e9) == whole and members["rows"] == 4
    assert members["predicted_tflops"] == pytest.approx(4 * rows["plain", "data=4"]["predicted_tflops"] / 4)


@pytest.mark.parametrize("flags, said", [
    (("--model-config", "none.json"), "none.json is no config.json, and none of gpt2, yi-6b, llama-3-8b"),
    (("--methods", "plain", "none"), "unknown method 'none'; valid names are plain, "),
    (("--length", 2000), "--length is 2000; gpt2 has 1024 positions"),
    (("--meshes", "rows=2"), "--mesh has 'rows=2'"),
    (("--members", 0), "--members is 0"),
    (("--model-config", "llama-3-8b", "--differs", ".*"), "at most 2147483647 can: name fewer"),
])  # fmt: skip
def test_refused_in_one_sentence(in_process, capsys, tmp_path, flags, said):
    with pytest.raises(SystemExit) as stop:
        in_process(memory, "refused", *flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
