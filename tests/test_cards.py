"""A model card says what is true of a folder, in the hub's format, and nothing that belongs to this machine."""

import json
import re
import shutil
import socket
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from omni_cli import files
from omni_cli.errors import DataError, OmniError, UsageError
from omni_cli.formats.physical_ai_av import LICENCE, REPOSITORY
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.report import Console
from omni_cli.samples.answer_formats import FORMATS
from omni_cli.stages import models, runs
from omni_cli.stages.cards import Published, card_text, escape, put_card
from omni_cli.stages.evaluate import EvalRequest, evaluate
from omni_cli.stages.export import ExportRequest, export, parse_push
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.origins import NOT_OURS, DataOrigin, base_origin, check_right, origin_of
from omni_cli.stages.push import PushRequest
from tests.support import with_torchvision
from tests.support.hub_push import TOKEN, Fault
from tests.support.pipeline import QUIET, make_run, tiny_recipe, write_synthetic

NAME = "me/drive"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4, large files


@pytest.fixture
def hub(push_hub):
    return push_hub


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("cards")
    write_synthetic(data, cameras=("camera_front_wide_120fov",))
    return data


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("adapted"), tiny_recipe(cameras="1-cam", mode="lora"), data=data)


@pytest.fixture(scope="module")
def in_full(data, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("full"), tiny_recipe("qwen3_vl", cameras="1-cam"), data=data)


@pytest.fixture(params=["adapted", "in_full"])
def made(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def learned_from(adapted, monkeypatch):
    """Let the run say that it learned from other data; its receipt is made to match."""
    path, before = adapted.run.folder / runs.LEARNED, (adapted.run.folder / runs.LEARNED).read_text()
    receipt = files.read_receipt(adapted.run.final)

    def say(source, licences=(), **more):
        files.write_json(path, {**json.loads(before), "source": source, "licences": list(licences), **more})
        files.put_receipt(adapted.run.final, {**receipt, "learned_sha256": files.sha256_of(path)})

    yield say
    files.write_text(path, before)
    files.put_receipt(adapted.run.final, receipt)


def exported(made, form=None, console=QUIET, **push):
    asked = PushRequest(NAME, **push) if push else None
    return export(made.recipe, made.run, ExportRequest(form, push=asked), console)


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def snippet(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def test_the_card_tells_what_the_model_is(made):
    folder = made.run.folder / "export" / "hf"
    exported(made)
    card, learned = card_of(folder), made.run.learned()
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "video-text-to-text")
    assert card.data.tags == ["omni", "driving", "vlm"]
    assert (card.data.license, card.data.base_model) == (None, None)  # drawn from a seed
    steps = files.read_receipt(made.run.final)["steps"]
    for told in (
        "Source: synthetic.",
        "Licence of the data: made by omni, free to use.",
        f"from {learned.windows} windows of 1 recording; recordings were split by hash",
        "4 frames at 10 Hz, 1x1 grid of cameras: front wide. How does the car move?",
        "Action: Displacement of 0.0 meters.",
        f"- steps: {steps}, batches of 2 x 1",
        "- tuned: lora, rank 4, alpha 8" if made.recipe.tune.mode == "lora" else "- tuned: in full",
        "Not evaluated",
        "It is **not for a car**",
    ):
        assert told in card.text
    assert ("## Merge" in card.text) == (made.recipe.tune.mode == "lora")
    assert runs.verified_folder(folder)


@pytest.mark.parametrize(
    ("labels", "does"),
    [
        ("ego-motion", "It reads how its own car moves from the pictures of its cameras."),
        ("speed", "It reads how fast its own car moves from the pictures of its cameras."),
        ("waypoints", "From the pictures of its cameras it foretells the path of its own car for 6.4 s."),
        ("reasoning", "From the pictures of its cameras it says what the driver does next and why, and foretells"),
    ],
)
def test_the_card_says_what_the_labels_are_of(labels, does):
    recipe = tiny_recipe(sample=VlmSample(labels=labels))
    about = recipe.about(recipe.preprocess(), "hf", NAME)
    assert about.does.startswith(does)
    assert FORMATS[labels].question in about.asked


DORA, TOWER = "vLLM does not serve DoRA adapters", "vLLM passed over adapters on the vision tower"


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ({}, ()),
        ({"mode": "dora"}, (DORA,)),
        ({"vision_targets": ("qkv",)}, (TOWER,)),
        ({"mode": "dora", "vision_targets": ("qkv",)}, (DORA, TOWER)),
    ],
)
def test_the_card_of_an_adapter_says_what_vllm_does_not_take(adapted, tune, told):
    """pain 16: it is merged first."""
    recipe = adapted.recipe.model_copy(update={"tune": adapted.recipe.tune.model_copy(update=tune)})
    card = card_text(recipe, adapted.run, Published("adapter"))
    assert tuple(sentence for sentence in (DORA, TOWER) if sentence in card) == told
    assert ("With vLLM:" in card) == ("omni merge RUN\nomni export RUN --format hf\n" in card) == bool(told)
    assert "With transformers:\n\n```python\n" in card
    whole = card_text(recipe, adapted.run, Published("hf"))
    assert not [sentence for sentence in (DORA, TOWER, "omni merge") if sentence in whole]


def test_nothing_of_this_machine_is_published(made, tmp_path):
    exported(made)
    folder = made.run.folder / "export" / "hf"
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json", ".jinja"))
    here = (socket.gethostname(), str(made.run.folder.parent), str(made.shards), str(tmp_path.parent), "/home/", "/tmp")
    assert not [word for word in here if word in text]
    assert not [name for name in made.run.learned().recordings if name in text]


@pytest.mark.skipif(not with_torchvision.is_here(), reason=with_torchvision.REASON)
@pytest.mark.parametrize("form", ["hf", "adapter"])
def test_the_code_in_the_card_answers_as_omni_does(made, form, tmp_path):
    """pains 2, 3, 8, 15: other tools load it from the card's own words, and say the same, word for word."""
    if form == "adapter" and made.recipe.tune.mode == "full":
        pytest.skip("it has no adapter")
    exported(made, form)
    folder, preprocess = made.run.folder / "export" / form, made.run.manifest.preprocess
    made.recipe.load_base(preprocess).save_pretrained(tmp_path / "base")
    code = snippet((folder / "README.md").read_text(), "python").replace('"BASE"', f'"{tmp_path / "base"}"')
    built = made.recipe.load(preprocess, made.run.final)
    black = torch.zeros(preprocess.window_shape, dtype=torch.uint8)
    said = made.recipe.predict(built, [made.recipe.prompt_row(black, preprocess, built.tokenizer, 10.0)], preprocess)
    assert with_torchvision.run(code, folder) == said[0].text + "\n"


def test_the_command_in_the_card_runs(made, data, monkeypatch, capsys, tmp_path):
    from omni_cli.__main__ import run

    exported(made)
    folder = made.run.folder / "export" / "hf"
    command = snippet((folder / "README.md").read_text(), "bash").split()
    (video,) = (data / "raw" / "synthetic").rglob("*front_wide*chunk_0000*.zip")
    monkeypatch.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        unpack_first(video, folder / "camera_front_wide_120fov.mp4")
        code = run([*command[1:], "--out", str(tmp_path / "said"), "--quiet", "--json"])
    (folder / "camera_front_wide_120fov.mp4").unlink()
    assert code == 0, capsys.readouterr().err


def unpack_first(archive, place):
    import zipfile

    with zipfile.ZipFile(archive) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".mp4"))
        place.write_bytes(opened.read(name))


def test_measured_it_tells_numbers_baselines_and_intervals(adapted):
    exported(adapted)
    folder = adapted.run.folder / "export" / "hf"
    assert "Not evaluated" in card_of(folder).text
    before = (folder / "model.safetensors").stat().st_mtime_ns
    report = evaluate(adapted.recipe, adapted.run, EvalRequest(blind=False), QUIET)
    seal_as_readable(adapted.run)
    exported(adapted)
    card = card_of(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before  # the card alone is new
    assert runs.verified_folder(folder)
    (first, *_) = card.data.eval_results
    assert (first.metric_type, first.metric_value) == (adapted.recipe.metrics[0].key, 1.5)
    assert first.dataset_name == f"{report['windows']} windows of synthetic, split val"
    assert "| model | 1.50 (1.00 .. 2.00) |" in card.text
    assert "| constant median |" in card.text
    assert "windows of 1 recording of synthetic, split val" in card.text
    merge(adapted.recipe, adapted.run, MergeRequest(), QUIET)
    assert "| model | 1.50 (1.00 .. 2.00) |" in card_of(adapted.run.folder / "merged").text


def seal_as_readable(run, **facts) -> None:
    """Give the untrained model readable answers, and the report other facts, in the one that omni sealed."""
    folder = run.folder / "eval"
    receipt, document = files.read_receipt(folder), files.read_json(folder / "report.json")
    document |= facts
    for key in [key.removesuffix("_interval") for key in document["conditions"][0] if key.endswith("_interval")]:
        document["conditions"][0] |= {key: 1.5, f"{key}_interval": [1.0, 2.0]}
    document["conditions"][0]["unreadable"] = 0.0
    files.write_json(folder / "report.json", document)
    runs.seal_folder(folder, **{key: value for key, value in receipt.items() if key != "files"})


@pytest.fixture
def measured_on(adapted):
    """Let the sealed report say that other data were measured."""
    report = evaluate(adapted.recipe, adapted.run, EvalRequest(blind=False), QUIET)
    assert (report["source"], report["licences"]) == ("synthetic", ["made by omni, free to use"])
    yield lambda source, names: seal_as_readable(adapted.run, source=source, licences=names)
    shutil.rmtree(adapted.run.folder / "eval")


def test_numbers_are_told_of_the_data_that_were_measured(adapted, measured_on):
    measured_on("comma2k19", ["MIT"])
    exported(adapted, "adapter")
    card = card_of(adapted.run.folder / "export" / "adapter")
    (first, *_) = card.data.eval_results
    assert (first.dataset_type, first.dataset_name.split(", ")[0][-9:]) == ("comma2k19", "comma2k19")
    assert "of comma2k19, split val" in card.text
    assert "Source: synthetic." in card.text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("physical_ai_av", f"not told: on data under the {LICENCE}, which forbids to tell results"),
        ("", "not told: the report does not say under which licence the measured data are"),
    ],
)
def test_numbers_that_may_not_be_told_are_left_out(hub, adapted, measured_on, source, told):
    measured_on(source, [])
    exported(adapted, "adapter", public=True)
    pushed = hub.repositories[NAME].files["README.md"].decode()
    assert told in pushed
    assert "1.50" not in pushed
    assert not ModelCard(pushed).data.eval_results
    exported(adapted, "adapter", licence=LICENCE)  # whose licensor said yes
    pushed = hub.repositories[NAME].files["README.md"].decode()
    assert ("1.50 (1.00 .. 2.00)" in pushed) == bool(source)


def test_the_card_tells_which_weights_and_what_learned(adapted):
    recipe, receipt = adapted.recipe, files.read_receipt(adapted.run.final)
    tune = recipe.tune.model_copy(update={"rank_stabilised": True, "vision_targets": ("qkv",), "train_merger": True})
    changed = recipe.model_copy(update={"tune": tune, "quantization": "nf4"})
    best = {"published_step": 1, "chosen_on": "val", "validation_loss": 3.25}
    files.put_receipt(adapted.run.final, {**receipt, **best})
    try:
        text = card_text(changed, adapted.run, Published("hf"))
    finally:
        files.put_receipt(adapted.run.final, receipt)
    assert "- weights: those of step 1, chosen by their loss of 3.2500 on split val; the loss below is not" in text
    for told in (
        "- tuned: lora, rank 4, alpha 8; rank-stabilised; on: q\\_proj, k\\_proj, v\\_proj, o\\_proj; "
        "in the vision tower on: qkv; the merger in full; its base in nf4",
    ):
        assert told in text
    assert "chosen by" not in card_text(recipe, adapted.run, Published("hf"))
    in_full = recipe.tune.model_copy(update={"mode": "full", "freeze": ("vision",)})
    told = card_text(recipe.model_copy(update={"tune": in_full}), adapted.run, Published("hf"))
    assert "- tuned: in full, but for vision" in told


def test_an_unsealed_or_outdated_report_is_not_believed(adapted):
    evaluate(adapted.recipe, adapted.run, EvalRequest(blind=False), QUIET)
    (adapted.run.folder / "eval" / "report.json").write_text("{}")
    assert "Not evaluated" in card_text(adapted.recipe, adapted.run, Published("hf"))


def test_the_merge_is_told(adapted):
    folder = merge(adapted.recipe, adapted.run, MergeRequest(), QUIET)["model"]
    parity = files.read_receipt(adapted.run.folder / "merged")["parity"]
    text = card_of(adapted.run.folder / "merged").text
    assert f"| merged | {parity['merged']:.3g} |" in text
    assert "omni infer" in text
    assert "AutoProcessor" not in text  # a merged folder has nothing of it
    assert folder


@pytest.mark.parametrize(
    "said", ["# a\n\n## b", "<script>x</script>", "a | b", "[x](http://y)", "`rm`", "![p](q)", "a*b*"]
)
def test_what_comes_from_data_is_shown_and_never_markup(adapted, said):
    shown = escape(said)
    assert "\n" not in shown
    assert not re.search(r"<\w|(?<!\\)[#`*|\[\]]", shown)
    learned = adapted.run.learned().model_copy(update={"source": said, "licences": (said,)})
    assert escape(said) in data_section(adapted, learned)


def data_section(made, learned):
    class Told(runs.Run):
        def learned(self):
            return learned

    text = card_text(made.recipe, Told(made.run.folder, made.run.manifest), Published("hf"))
    assert yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    return text


def test_published_bases_have_their_names_and_licences(adapted):
    for name, header in (
        ("Qwen/Qwen2.5-VL-7B-Instruct", {"license": "apache-2.0"}),
        ("Qwen/Qwen2.5-VL-3B-Instruct", {"license": "other", "license_name": "qwen-research"}),
        ("someone/else", {}),
    ):
        recipe = adapted.recipe.model_copy(update={"model": name})
        card = ModelCard(card_text(recipe, adapted.run, Published("adapter", NAME)))
        told = card.data.to_dict()
        assert {key: told[key] for key in ("license", "license_name") if key in told} == header
        assert (card.data.base_model, card.data.library_name) == (name, "peft")
        assert f'source, base = "{NAME}", "{name}"' in card.text
        in_onnx = ModelCard(card_text(recipe, adapted.run, Published("onnx", NAME)))
        assert (in_onnx.data.base_model, in_onnx.data.library_name) == (name, "onnx")
    pinned = adapted.recipe.model_copy(update={"model": "Qwen/Qwen2.5-VL-3B-Instruct@abc"})
    card = ModelCard(card_text(pinned, adapted.run, Published("adapter", NAME)))
    assert (card.data.base_model, card.data.to_dict()["license_name"]) == (pinned.model[:-4], "qwen-research")
    assert f'source, base = "{NAME}", "{pinned.model[:-4]}"' in card.text
    assert 'from_pretrained(base, revision="abc", dtype="auto")' in card.text
    assert "Base weights: Qwen/Qwen2.5-VL-3B-Instruct, revision abc." in card.text
    local = adapted.recipe.model_copy(update={"model": "/home/me/secret"})
    assert "secret" not in card_text(local, adapted.run, Published("hf"))


@pytest.mark.parametrize(
    ("base", "noted", "header"),
    [
        ("7B", ["MIT"], "apache-2.0"),
        ("7B", [LICENCE], LICENCE),
        ("7B", ["CC BY-NC-SA 4.0"], "CC BY-NC-SA 4.0"),
        ("3B", ["CC BY-NC-SA 4.0"], "CC BY-NC-SA 4.0; qwen-research"),
        ("7B", None, "my own"),
    ],
)
def test_the_weights_are_under_the_licence_of_their_data_too(learned_from, adapted, base, noted, header):
    learned_from("somewhere", noted or [], base={"source": "none of omni's" if noted else "", "licences": []})
    recipe = adapted.recipe.model_copy(update={"model": f"Qwen/Qwen2.5-VL-{base}-Instruct"})
    told = ModelCard(card_text(recipe, adapted.run, Published("adapter", licence_override="my own"))).data
    is_listed = header == "apache-2.0"
    assert (told.license, told.to_dict().get("license_name")) == (header, None) if is_listed else ("other", header)


# -- licences


def test_the_licence_follows_the_base(data, in_full, adapted, tmp_path):
    exported(in_full)
    hf, base = in_full.run.folder / "export" / "hf", tmp_path / "base"
    card = files.read_json(hf / "omni.json")
    assert (card["source"], card["licences"]) == ("synthetic", ["made by omni, free to use"])
    shutil.copytree(hf, base)
    files.write_json(base / "omni.json", {**card, "source": "physical_ai_av", "licences": [LICENCE]})
    recipe = tiny_recipe(model=str(base), cameras="1-cam", mode="lora")
    made = make_run(tmp_path, recipe, data=data)
    both = DataOrigin("synthetic, physical_ai_av", (LICENCE, "made by omni, free to use"))
    assert origin_of(made.run) == both
    with pytest.raises(UsageError, match=r"4\.6 forbids"):
        exported(made, "adapter", dry_run=True)
    merged = merge(recipe, made.run, MergeRequest(), QUIET)["model"]
    assert base_origin(merged) == both  # and on, from model to model
    assert base_origin(str(in_full.run.final)) == DataOrigin("synthetic", ("made by omni, free to use",))


def test_the_licence_follows_a_base_of_the_hub(tmp_path, monkeypatch):
    cached = tmp_path / "models--me--drive"
    snapshot = cached / "snapshots" / ("c" * 40)
    files.write_text(cached / "refs" / "main", "c" * 40)
    files.write_json(snapshot / "config.json", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_origin("me/drive") == NOT_OURS
    files.write_json(snapshot / "omni.json", {"source": "physical_ai_av", "licences": [LICENCE]})
    for model in ("me/drive", "me/drive@main"):
        assert base_origin(model) == DataOrigin("physical_ai_av", (LICENCE,))


@pytest.mark.parametrize("card", [{}, {"source": ""}, [], {"source": "x", "licences": "y"}])
def test_of_a_model_of_omni_that_notes_no_data_nothing_is_known(adapted, tmp_path, card):
    files.write_json(tmp_path / "omni.json", card)
    assert base_origin(str(tmp_path)) == DataOrigin()
    assert base_origin("/no/such/folder") == DataOrigin()
    for others in ("tiny:qwen3_vl", str(tmp_path.parent)):
        assert base_origin(others) == NOT_OURS
    path, before = adapted.run.folder / runs.LEARNED, (adapted.run.folder / runs.LEARNED).read_text()
    try:
        files.write_json(path, {**json.loads(before), "base": {"source": "", "licences": []}})
        assert origin_of(adapted.run) == DataOrigin("", ("made by omni, free to use",))
        with pytest.raises(UsageError, match="of this run or of its base"):
            check_right(origin_of(adapted.run), None)
    finally:
        files.write_text(path, before)


def test_a_run_notes_its_data_and_an_older_one_is_asked_by_its_shards(adapted):
    assert origin_of(adapted.run) == DataOrigin("synthetic", ("made by omni, free to use",))
    path = adapted.run.folder / runs.LEARNED
    before = path.read_text()
    try:  # as omni 0.5 wrote it
        files.write_json(path, {key: value for key, value in json.loads(before).items()
                                if key not in ("source", "licences")})  # fmt: skip
        assert origin_of(adapted.run) == DataOrigin("synthetic", ("made by omni, free to use",))
        other = adapted.run.manifest.shards.model_copy(update={"fingerprint": "another"})
        gone = replace(adapted.run, manifest=adapted.run.manifest.model_copy(update={"shards": other}))
        assert origin_of(gone) == DataOrigin()
    finally:
        files.write_text(path, before)
    with pytest.raises(UsageError, match=r"nothing says under which licence .* name the licence with --licence NAME"):
        check_right(DataOrigin(), None)
    check_right(DataOrigin(), "MIT")


def test_of_several_licences_the_strictest_counts(learned_from, adapted):
    learned_from("physical_ai_av")  # noted by nobody: the source says it
    assert origin_of(adapted.run).licences == (LICENCE,)
    learned_from("mixed", ["MIT", LICENCE])
    with pytest.raises(UsageError, match=r"4\.6 forbids redistribution and derivative works"):
        check_right(origin_of(adapted.run), None)
    learned_from("openpilot")
    check_right(origin_of(adapted.run), None)


@pytest.mark.parametrize("named", [None, "yes", LICENCE.lower()])
def test_data_that_may_not_be_shared_are_not_pushed(hub, learned_from, adapted, named):
    learned_from("physical_ai_av", [LICENCE])
    with pytest.raises(
        UsageError, match=f'under the {LICENCE}: .* nothing is pushed.*--licence "{LICENCE}"'
    ) as refused:
        exported(adapted, "adapter", licence=named)
    assert "\n" not in str(refused.value)
    assert not hub.log


def test_named_by_its_name_a_licence_is_overridden_and_that_is_recorded(hub, learned_from, adapted):
    learned_from("physical_ai_av", [LICENCE])
    exported(adapted, "adapter", licence=LICENCE)
    folder = adapted.run.folder / "export" / "adapter"
    assert files.read_receipt(folder)["licence_override"] == LICENCE
    told = f"Pushed by someone who claims the right to do so under: {LICENCE}."
    pushed = hub.repositories[NAME].files["README.md"].decode()
    assert told in pushed
    assert ModelCard(pushed).data.datasets == [REPOSITORY]
    exported(adapted, "adapter")  # without a push: what was done stays told
    assert told in card_of(folder).text


# -- export --push-to-hub


def test_an_adapter_is_pushed_with_its_card(hub, adapted, capsys):
    result = exported(adapted, "adapter", Console(), public=True)
    folder, repository = adapted.run.folder / "export" / "adapter", hub.repositories[NAME]
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert result["push"]["commit"] == repository.head
    assert f'source, base = "{NAME}"' in repository.files["README.md"].decode()
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] is None
    assert TOKEN not in capsys.readouterr().err + json.dumps(result) + str(repository.files)
    hub.log.clear()
    assert exported(adapted, "adapter", public=True)["push"]["files"] == []
    assert not hub.asked("POST|PUT")


def test_after_a_failed_push_the_card_names_what_it_named_before(hub, adapted, tmp_path):
    request = ExportRequest("adapter", tmp_path / "new", push=PushRequest(NAME))
    hub.faults.append(Fault("POST /api/repos/create", 403))
    with pytest.raises(OmniError, match="answers 403"):
        export(adapted.recipe, adapted.run, request, QUIET)
    assert 'source, base = "."' in card_of(tmp_path / "new").text
    export(adapted.recipe, adapted.run, request, QUIET)
    assert f'source, base = "{NAME}"' in card_of(tmp_path / "new").text
    assert runs.verified_folder(tmp_path / "new")


def test_two_do_not_write_a_card_at_once(adapted):
    exported(adapted, "adapter")
    folder = adapted.run.folder / "export" / "adapter"
    with models.held(folder, "exporting to"), pytest.raises(OmniError, match="another omni is writing the card of"):
        exported(adapted, "adapter")
    receipt = files.read_receipt(folder)
    files.receipt_path(folder).unlink()
    with pytest.raises(OmniError, match="another omni was stopped while it wrote there; run the same command again"):
        put_card(folder, "another")
    files.put_receipt(folder, receipt)


def test_a_folder_of_omni_05_is_made_anew(adapted):
    merge(adapted.recipe, adapted.run, MergeRequest(), QUIET)
    exported(adapted, "adapter")
    for folder in (adapted.run.folder / "merged", adapted.run.folder / "export" / "adapter"):
        receipt = files.read_receipt(folder)
        files.put_receipt(folder, {key: value for key, value in receipt.items() if key != "format"} | {"old": True})
    merge(adapted.recipe, adapted.run, MergeRequest(), QUIET)
    exported(adapted, "adapter")
    for folder in (adapted.run.folder / "merged", adapted.run.folder / "export" / "adapter"):
        assert "old" not in files.read_receipt(folder)


def test_a_dry_run_exports_and_pushes_nothing(hub, adapted, tmp_path, capsys):
    request = ExportRequest("hf", tmp_path / "new", push=PushRequest(NAME, dry_run=True))
    result = export(adapted.recipe, adapted.run, request, Console())
    assert not list(tmp_path.iterdir())
    assert not hub.log
    assert (result["is_made"], result["push"]["bytes"] > 1000) == (False, True)
    said = capsys.readouterr().err
    assert "data: synthetic, made by omni, free to use; it may be pushed" in said
    assert "and then push it to me/drive" in said
    exported(adapted, "adapter")
    assert exported(adapted, "adapter", dry_run=True)["push"]["files"]
    assert not hub.asked("POST|PUT")


def test_a_dry_run_refuses_what_a_push_would(hub, learned_from, adapted):
    learned_from("physical_ai_av", [LICENCE])
    with pytest.raises(UsageError, match="nothing is pushed"):
        exported(adapted, dry_run=True)


def test_a_run_in_full_has_no_adapter(in_full):
    with pytest.raises(UsageError, match="--format adapter: run run was tuned in full and has none; use --format hf"):
        exported(in_full, "adapter")


def test_the_command_line_pushes_and_refuses_with_its_exit_codes(hub, learned_from, adapted, capsys):
    from omni_cli.__main__ import run

    command = ["export", str(adapted.run.folder), "--format", "adapter", "--push-to-hub", NAME, "--quiet", "--json"]
    codes = [run([*command, "--dry-run"]), run(command), run([*command, "--public"])]
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert codes == [0, 0, 0]
    assert [bool(one["push"]["files"]) for one in documents] == [True, True, False]
    assert documents[1]["push"]["commit"] == documents[2]["push"]["commit"] == hub.repositories[NAME].head
    learned_from("physical_ai_av", [LICENCE])
    hub.repositories.clear()
    assert [run(command), run([*command, "--licence", LICENCE])] == [2, 0]
    assert run(["export", str(adapted.run.folder), "--push-to-hub", "drive"]) == 2
    assert run(["export", str(adapted.run.folder), "--public"]) == 2
    hub.writable = ()
    hub.repositories.clear()
    assert run([*command, "--licence", LICENCE]) == 1
    assert TOKEN not in "".join(capsys.readouterr())


def test_options_of_a_push_need_one():
    for options in ({"public": True}, {"licence": LICENCE}, {"dry_run": True}):
        given = {"public": False, "licence": None, "dry_run": False, **options}
        with pytest.raises(UsageError, match="is an option of --push-to-hub; name the repository with --push-to-hub"):
            parse_push(None, **given)
    assert parse_push(NAME, public=True, licence=None, dry_run=False) == PushRequest(NAME, public=True)


def test_a_run_that_does_not_say_what_it_learned_from_has_no_card(adapted, tmp_path):
    elsewhere = replace(adapted.run, folder=tmp_path)
    with pytest.raises(DataError, match="omni train writes it again"):
        card_text(adapted.recipe, elsewhere, Published("hf"))
