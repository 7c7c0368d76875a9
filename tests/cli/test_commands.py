"""The command line: every command, every way to hold it wrong, and what it does to stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn

pytest.importorskip("click")
pytest.importorskip("rich")

from click.testing import CliRunner, Result

from hookattn.cli import main
from hookattn.cli.commands import app
from hookattn.cli.options import positions
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.store import FORMAT_VERSION
from hookattn.testing.recheck import CHECKS, STORED, recheck

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["[PAD]", "[UNK]", "<s>", "the", "cat", "sat", "on", "mat", "."]
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
    def forward(self, x):
        return self.attn(x, x, x)[0]

class Plain(nn.Module):
    def forward(self, x):
        return x + 1

class Raises(Net):
    def forward(self, x):
        raise RuntimeError("the roof\\nis on fire")

model = Net()
def build(): return Net(), torch.randn(2, 5, 16)
def plain(): return Plain(), torch.randn(2)
def raises(): return Raises(), torch.randn(2)
def number(): return 3
def fails(): raise ValueError("no luck")
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:  # it has read the variable already
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as transformers saves them, and a module with factories."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")

    def tokenizer(path: Path, **special: str) -> None:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special).save_pretrained(path)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=2, n_embd=32, n_head=4, vocab_size=len(WORDS), n_positions=64, bos_token_id=2, eos_token_id=2
            )
        )
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=len(WORDS), decoder_start_token_id=0
            )
        )
        vit = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=8,
            )
        )
    for name, model in (("gpt", gpt), ("bare", gpt), ("t5", t5), ("vit", vit)):
        model.save_pretrained(folder / name)
    tokenizer(folder / "gpt", eos_token="<s>")
    tokenizer(folder / "t5", pad_token="[PAD]", eos_token="<s>")
    (folder / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "wrong.json").write_text('{"pixels": [[1, 2]]}')
    (folder / "factories_of_test_cli.py").write_text(FACTORY)
    return folder


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace file of the model that ships."""
    path = tmp_path_factory.mktemp("traced") / "run.safetensors"
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        hookattn.trace(load_pretrained(), ids, tokens=[str(i) for i in ids[0].tolist()], to=path)
    return path


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def in_models(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.chdir(models)
    monkeypatch.syspath_prepend(str(models))


def fails(*args: object, code: int = 1) -> str:
    """Run, expect failure, and return the one line it says."""
    result = run(*args, code=code)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        lines = result.stderr.strip().splitlines()
        assert len([line for line in lines if line.startswith("error: ")]) == 1 and lines[-1].startswith("error: ")
    return result.stderr


# What everything has in common


@pytest.mark.parametrize("command", [(), *((name,) for name in app.commands)])
def test_help_shows_examples(command: tuple[str, ...]) -> None:
    out = run(*command, "--help").stdout
    assert f"hookattn {' '.join(command)}".strip() in out.partition("\n")[2]
    assert ("--debug" in out and "Examples:" in out) or not command


def test_the_program_prints_its_help() -> None:
    script = "from hookattn.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0 and "Usage: hookattn" in done.stdout, done.stderr
    assert all(name in done.stdout for name in ("trace", "info", "verify", "adapters", "demo"))


@pytest.mark.parametrize("name", ["click", "rich"])
def test_without_click_or_rich_one_line_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit:
        main(["info", "x"])
    said = capsys.readouterr().err
    assert exit.value.code == 2
    assert said.count("\n") == 1 and 'pip install "hookattn[cli]"' in said and name in said


def test_importing_the_library_imports_nothing_of_the_command_line() -> None:
    script = "import sys, hookattn; print(sorted({'click', 'rich', 'transformers', 'hookattn.cli'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[]", done.stderr


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("info", tmp_path / "none.safetensors", "--debug", code=1)
    assert "Traceback" in result.stderr and result.stderr.strip().splitlines()[-1].startswith("error: ")


# trace


def test_trace_writes_a_file_that_loads(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    said = run("trace", models / "gpt", "--text", "the cat sat", "--text", "cat", "-o", out, "--verify", "full").stdout
    assert "2 calls faithful" in said and "transformer.h.1.attn" in said and f"wrote {out}" in said
    trace = hookattn.load(out)
    assert trace.tokens == [["the", "cat", "sat"], ["cat", "<s>", "<s>"]]
    assert trace[0].weights.shape == (2, 4, 3, 3) and trace.faithful
    assert not trace[0].mask[1, 0, 2, 2]  # padding


def test_trace_is_what_the_library_traces(models: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run.safetensors"
    run("trace", models / "gpt", "--text", "the cat sat on the mat .", "-o", out)
    model = transformers.GPT2LMHeadModel.from_pretrained(models / "gpt")
    ids = transformers.AutoTokenizer.from_pretrained(models / "gpt")("the cat sat on the mat .", return_tensors="pt")
    with torch.no_grad():
        expected = hookattn.trace(model, ids)
    for a, b in zip(hookattn.load(out), expected, strict=True):
        assert torch.equal(a.weights, b.weights) and torch.equal(a.output, b.output)


def test_trace_selects_and_narrows(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    run(
        "trace",
        models / "gpt",
        "--text",
        "the cat sat",
        "-o",
        out,
        "--capture",
        "q,weights",
        "--layers",
        "-1",
        "--heads",
        "0,3",
        "--queries",
        "-2:",
        "--dtype",
        "float16",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--attn",
        "eager",
    )
    (call,) = hookattn.load(out)
    assert {*call.fields} - {"applied"} == {"q", "weights"} and call.site.layer == 1 and call.tap != "sdpa"
    assert call.heads == (0, 3) and call.queries == (1, 2) and call.weights.dtype == torch.float16
    assert call.weights.shape == (1, 2, 2, 3)
    assert call.of_queries == json.loads(run("info", out, "--json").stdout)["calls"][0]["of_queries"] == 3


def test_trace_generates_step_by_step(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    said = run(
        "trace",
        models / "gpt",
        "--text",
        "the cat",
        "--text",
        "sat",
        "--generate",
        "3",
        "--compact",
        "-o",
        out,
        "--strict",
    ).stdout
    trace = hookattn.load(out)
    assert [c.step for c in trace] == [0, 0, 1, 1, 2, 2] and "T1–2 S2–4" in said
    assert trace.tokens is not None and [len(row) for row in trace.tokens] == [5, 5]
    assert trace.tokens[1][:2] == ["<s>", "sat"]  # padded on the left
    assert "weights" not in trace[0].fields and trace[0].weights.shape == (2, 4, 2, 2)


def test_trace_without_a_file_prints_only_the_table(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "2 calls faithful" in run("trace", models / "gpt", "--text", "the cat").stdout
    assert list(tmp_path.iterdir()) == []


def test_trace_json_is_all_of_stdout(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    made = json.loads(run("trace", models / "gpt", "--pair", "the cat", "the mat", "-o", out, "--json").stdout)
    assert made["file"] == str(out) and made["faithful"] and made["bytes"] == out.stat().st_size
    assert made["calls"][1]["extents"] == {"B": 1, "H": 4, "G": 4, "T": 4, "S": 4, "D": 8, "E": 8}
    assert made["calls"][1]["certificate"]["status"] == "faithful"
    assert json.loads(run("trace", models / "gpt", "--text", "the", "--json").stdout)["file"] is None


def test_trace_an_encoder_decoder(models: Path) -> None:
    result = run("trace", models / "t5", "--text", "the cat sat")
    assert "EncDecAttention" in result.stdout and "cross" in result.stdout and "start token" in result.stderr
    made = run("trace", models / "t5", "--text", "the cat sat", "--generate", "2", "--json")
    calls = json.loads(made.stdout)["calls"]
    assert {c["stack"] for c in calls} == {"encoder", "decoder"} and {c["step"] for c in calls} == {0, 1}
    shown = run("trace", models / "t5", "--text", "the cat sat", "--generate", "2").stdout
    assert "the cat sat" in shown and "tokens decoder" in shown
    data = json.loads(made.stdout)
    assert data["tokens"][0][:3] == ["the", "cat", "sat"]
    decoder = data["stack_tokens"]["decoder"][0]
    assert decoder[0] == "[PAD]" and len(decoder) == 3  # what it starts with, and the two new ones


def test_trace_an_image(models: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 40), (200, 10, 10)).save(tmp_path / "red.png")
    made = json.loads(run("trace", models / "vit", "--image", tmp_path / "red.png", "--json").stdout)
    assert made["calls"][0]["extents"]["T"] == 17 and made["faithful"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".json", ".npz"])
def test_trace_named_inputs_from_a_file(suffix: str, models: Path, tmp_path: Path) -> None:
    ids, path = torch.tensor([[3, 4, 5]]), tmp_path / f"in{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"input_ids": ids}, path)
    elif suffix == ".pt":
        torch.save({"input_ids": ids}, path)
    elif suffix == ".json":
        path.write_text(json.dumps({"input_ids": ids.tolist(), "use_cache": False}))
    else:
        pytest.importorskip("numpy").savez(path, input_ids=ids.numpy())
    made = json.loads(run("trace", models / "bare", "--inputs", path, "--json").stdout)
    assert made["calls"][0]["extents"]["T"] == 3


def test_trace_a_factory(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_models(monkeypatch, models)
    made = json.loads(run("trace", "factories_of_test_cli:build", "--json").stdout)
    assert made["model"]["class"] == "Net" and made["calls"][0]["extents"]["T"] == 5
    torch.save(torch.randn(1, 7, 16), tmp_path / "x.pt")
    for name in ("model", "Net"):
        out = run("trace", f"factories_of_test_cli:{name}", "--inputs", tmp_path / "x.pt", "--json").stdout
        assert json.loads(out)["calls"][0]["extents"]["T"] == 7


def test_trace_says_when_weights_are_missing(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "gpt"
    folder.mkdir()
    for path in (models / "gpt").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "h.1.mlp" not in k}, folder / "model.safetensors", {"format": "pt"})
    assert "drawn at random" in run("trace", folder, "--text", "the").stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["./nowhere", "--text", "a"], "no such directory"),
        (["a/b/c", "--text", "a"], "no such directory"),
        (["no-such-model-anywhere", "--text", "a"], "Offline, give the directory"),
        (["empty", "--text", "a"], "no config.json"),
        (["broken", "--text", "a"], "cannot be read as JSON"),
        (["bare", "--text", "a"], "has no tokenizer"),
        (["vit", "--text", "a"], "has no tokenizer"),
        (["gpt", "--text", ""], "makes no token"),
        (["gpt", "--text", "a", "--attn", "nonsense"], "attn_implementation"),
        (["gpt", "--text", "a", "-o", "no/such/run.safetensors"], "does not exist"),
        (["gpt", "--text", "a", "-o", "gpt"], "is a directory"),
        (["gpt", "--text", "a", "--capture", "nonsense"], "choose among"),
        (["gpt", "--text", "a", "--heads", "9"], "no head 9"),
        (["gpt", "--text", "a", "--layers", "9"], "layers=[9]"),
        (["gpt", "--inputs", "none.json"], "no such file"),
        (["factories_of_test_cli:model", "--inputs", "wrong.json"], "do not fit"),
        (["gpt", "--inputs", "gpt/config.json"], "no even, nested list"),
        (["gpt", "--inputs", "factories_of_test_cli.py"], "inputs are read from"),
        (["factories_of_test_cli:nothing"], "has no 'nothing'; it has Net"),
        (["no_such_module:build"], "no module 'no_such_module'"),
        (["factories_of_test_cli:number"], "gave int"),
        (["factories_of_test_cli:fails"], "no luck"),
        (["factories_of_test_cli:plain"], "no attention ran"),
        (["factories_of_test_cli:raises"], "RuntimeError: the roof (raised by the model"),
        (["factories_of_test_cli:model"], "let the factory return"),
        (["factories_of_test_cli:model", "--text", "a"], "has no tokenizer"),
        (["factories_of_test_cli:model", "--image", "a.png"], "has no image processor"),
        (["factories_of_test_cli:build", "--generate", "2"], "has no generate()"),
        (["factories_of_test_cli:build", "--attn", "eager"], "its own factory"),
    ],
)
def test_what_cannot_be_traced_is_one_line(
    args: list[str], words: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_models(monkeypatch, models)
    assert words in fails("trace", *args)


def test_an_image_needs_an_image_and_an_image_processor(models: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = tmp_path / "red.png"
    image.new("RGB", (8, 8)).save(picture)
    assert "has no image processor" in fails("trace", models / "gpt", "--image", picture)
    picture.write_text("no picture")
    assert "cannot be read as an image" in fails("trace", models / "vit", "--image", picture)


def test_a_device_that_is_not_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in fails("trace", models / "gpt", "--text", "a", "--device", "cuda")


@pytest.mark.parametrize(
    "content", [b"", b"no such format", b'{"input_ids": [[1], [2, 3]]}', b'{"input_ids": ["a"]}', b"3"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".json", ".npz"])
def test_unreadable_inputs(suffix: str, content: bytes, models: Path, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    path.write_bytes(content)
    assert str(path) in fails("trace", models / "gpt", "--inputs", path)


def test_inputs_run_no_code(models: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"input_ids": Evil()}, tmp_path / "in.pt")
    assert "Only tensors" in fails("trace", models / "gpt", "--inputs", tmp_path / "in.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["gpt"],
        ["gpt", "--text", "a", "--pair", "a", "b"],
        ["gpt", "--text", "a", "--compact"],
        ["gpt", "--text", "a", "--layers", "x"],
        ["gpt", "--text", "a", "--queries", "1:2:0"],
        ["gpt", "--text", "a", "--dtype", "int8"],
        ["gpt", "--text", "a", "--generate", "0"],
        ["gpt", "--nonsense"],
    ],
)
def test_usage_errors_exit_with_2(args: list[str]) -> None:
    assert "Usage: " in fails("trace", *args, code=2)


def test_positions() -> None:
    context: Any = None
    assert [positions(context, context, x) for x in ("-1", "0,3", "-8:", ":4", "0:64:2", None)] == [
        [-1],
        [0, 3],
        slice(-8, None),
        slice(None, 4),
        slice(0, 64, 2),
        None,
    ]


# info


def test_info(traced: Path) -> None:
    out = run("info", traced).stdout
    assert "blocks.0.attn" in out and "B1 H4 T17 S17 D16" in out and "2 calls faithful" in out and "hookattn 0" in out
    assert run("info", traced, "--every-call").stdout.count("blocks.") == 2


def test_info_json(traced: Path) -> None:
    made = json.loads(run("info", traced, "--json").stdout)
    assert made["format_version"] == list(FORMAT_VERSION) and made["versions"]["torch"] == torch.__version__
    assert made["tokens"][0][0] == "0" and made["bytes_of_fields"]["weights"] == 2 * 4 * 17 * 17 * 4
    assert [c["path"] for c in made["calls"]] == ["blocks.0.attn", "blocks.1.attn"]


def test_info_lists_what_was_skipped(tmp_path: Path, traced: Path) -> None:
    trace = hookattn.load(traced)
    trace.skipped = [hookattn.Skipped("blocks.7.mixer", "linear attention has no softmax")]
    trace.save(tmp_path / "run.safetensors")
    assert "skipped blocks.7.mixer: linear attention" in run("info", tmp_path / "run.safetensors").stdout


@pytest.mark.parametrize("command", ["info", "verify"])
def test_files_that_are_no_trace(command: str, tmp_path: Path, traced: Path) -> None:
    from safetensors.torch import save_file

    assert "cannot open" in fails(command, tmp_path / "none.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in fails(command, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(traced.read_bytes()[:-100])
    assert "cut.safetensors" in fails(command, tmp_path / "cut.safetensors", "--json")


def test_piped_output_has_no_control_codes_and_folds_nothing(traced: Path) -> None:
    environment = {k: v for k, v in _environment().items() if k not in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")}
    script = f"from hookattn.cli import main; main(['verify', {str(traced)!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr, done.stderr
    assert done.stderr == ""


# verify


def test_verify_passes_what_was_traced(traced: Path) -> None:
    assert run("verify", traced).stdout.count("pass") >= 2
    made = json.loads(run("verify", traced, "--json").stdout)
    assert made["passed"] and [c["result"] for c in made["calls"]] == ["pass", "pass"]
    checks = made["calls"][0]["checks"]
    assert {name: check["passed"] for name, check in checks.items()} == dict.fromkeys((*CHECKS, STORED), True)


@pytest.mark.parametrize(
    ("field", "failing"),
    [
        ("weights", {"weights", "masked", "rows", "output"}),
        ("v", {"output"}),
        ("output", {"output"}),
        ("q", {"scores"}),
        ("mask", {"weights", "masked"}),
        ("scores", {"scores", "weights"}),
    ],
)
def test_verify_finds_what_was_changed(field: str, failing: set[str], traced: Path, tmp_path: Path) -> None:
    trace, path = hookattn.load(traced), tmp_path / "run.safetensors"
    value = trace[1].get(field)
    assert value is not None
    if field == "mask":
        value[..., 9, 2:8] = False
    else:
        value[0, 2, 9] += 1 + 30 * torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(0))
    trace[1].fields[field] = value
    trace.save(path)
    out = run("verify", path, code=1).stdout
    assert "FAIL" in out and "1 of 2 calls failed" in out
    made = json.loads(run("verify", path, "--json", code=1).stdout)
    assert [c["result"] for c in made["calls"]] == ["pass", "fail"]
    assert {name for name, check in made["calls"][1]["checks"].items() if check["passed"] is False} == failing


def test_verify_fails_on_values_that_are_not_numbers(traced: Path, tmp_path: Path) -> None:
    trace, path = hookattn.load(traced), tmp_path / "run.safetensors"
    weights = trace[0].weights
    weights[0, 0, 3, 1] = float("nan")
    trace[0].fields["weights"] = weights
    trace.save(path)
    made = json.loads(run("verify", path, "--json", code=1).stdout)
    assert made["calls"][0]["checks"]["weights"] == {"passed": False, "error": "nan", "tolerance": pytest.approx(5e-5)}


def test_verify_fails_on_an_unfaithful_certificate(traced: Path, tmp_path: Path) -> None:
    import dataclasses

    trace, path = hookattn.load(traced), tmp_path / "run.safetensors"
    trace[0].certificate = dataclasses.replace(trace[0].certificate, status="unfaithful", output_error=1.0)
    trace.save(path)
    assert "unfaithful" in run("verify", path, code=1).stdout
    assert "1 of 2 calls unfaithful" in run("info", path).stdout


def test_verify_says_what_it_could_not_check(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with torch.no_grad():
        hookattn.trace(load_pretrained(), example_tokens(0, length=8), to=path, capture=("q", "k"))
    out = run("verify", path).stdout
    assert "2 of 2 calls could not be checked" in out
    assert "output not checked: weights and v and output were not kept" in out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"heads": [1, 3], "queries": [0, 5, 16]},
        {"capture": ("weights", "v", "output")},
        {"capture": ("q", "k", "v", "bias", "mask", "sinks", "output")},
    ],
)
def test_recheck_passes_however_it_was_stored(options: dict[str, Any], tmp_path: Path) -> None:
    with torch.no_grad():
        trace = hookattn.trace(load_pretrained(), example_tokens(1, length=8), **options)
    trace.save(tmp_path / "run.safetensors")
    for call in hookattn.load(tmp_path / "run.safetensors"):
        whole, pieces = recheck(call), recheck(call, budget=1)
        assert any(check.passed for check in whole.values())
        assert all(check.passed is not False for check in whole.values()), whole
        assert {n: c.passed for n, c in whole.items()} == {n: c.passed for n, c in pieces.items()}
        assert all(c.error == pytest.approx(pieces[n].error, abs=1e-12) for n, c in whole.items())


def test_recheck_knows_groups_sinks_bias_softcap_and_empty_rows() -> None:
    from hookattn import Call, Certificate, Site

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 5), (2, 7), (2, 7)))
    bias, mask = torch.randn(1, 4, 5, 7, generator=generator), torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    mask[0, 0, 2] = False
    sinks = torch.randn(4, generator=generator)
    scores = 3 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.5 / 3) + bias
    joined = torch.cat([scores.masked_fill(~mask, -torch.inf), sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    weights = joined.softmax(-1)[..., :-1]
    fields = {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "scores": scores,
        "mask": mask,
        "sinks": sinks,
        "weights": weights,
        "output": weights @ v.repeat_interleave(2, 1),
    }
    certificate = Certificate("faithful", 0.0, None, 0.0, 1e-4, 1e-4, 5, 5)

    def call(**changed: torch.Tensor) -> Call:
        return Call(
            Site("attn"),
            0,
            0,
            "test",
            torch.float32,
            0.5,
            softcap=3.0,
            certificate=certificate,
            fields={**fields, **changed},
            derivable=("scores", "weights"),
        )

    assert {n: c.passed for n, c in recheck(call()).items()} == {**dict.fromkeys(CHECKS, True), STORED: None}
    assert recheck(call(sinks=sinks + 1))["weights"].passed is False
    assert recheck(call(bias=bias + 1))["scores"].passed is False
    assert recheck(call(k=k.flip(1)))["scores"].passed is False


# adapters


def test_adapters() -> None:
    class Mine(hookattn.Adapter):
        name = "mine-of-test-cli"
        covers = ("a_package_of_test_cli.modeling",)
        attention = {"MySelfAttention": "self"}

    from hookattn.models.registry import unregister

    hookattn.register(Mine())
    try:
        assert "MySelfAttention (self)" in run("adapters").stdout
        found = {entry["name"]: entry for entry in json.loads(run("adapters", "--json").stdout)}
    finally:
        unregister(Mine.name)
    assert found[Mine.name]["distribution"] == "register()"
    assert found[Mine.name]["covers"] == ["a_package_of_test_cli.modeling"]


def test_no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.cli import adapters

    monkeypatch.setattr(adapters, "installed", dict)
    assert "No adapters" in run("adapters").stdout
    assert json.loads(run("adapters", "--json").stdout) == []


def test_a_broken_adapter_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.cli import adapters

    def broken() -> None:
        raise hookattn.BrokenAdapterError("distribution 'theirs' cannot be loaded")

    monkeypatch.setattr(adapters, "installed", broken)
    assert "distribution 'theirs'" in fails("adapters")


def test_verify_fails_where_a_bit_is_another(traced: Path, tmp_path: Path) -> None:
    raw = bytearray(traced.read_bytes())
    raw[-1] ^= 1
    (path := tmp_path / "flipped.safetensors").write_bytes(raw)
    (name,) = json.loads(run("verify", path, "--json", code=1).stdout)["damaged"]
    assert f"{name}: its bytes are not those that were written" in " ".join(run("verify", path, code=1).stdout.split())
