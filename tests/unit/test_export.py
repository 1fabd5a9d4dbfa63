"""Export of every architecture to every format, and the exports that are refused."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cnnray.commandline import parse
from cnnray.cpus import usable_cpus
from cnnray.images.decode import BadImage
from cnnray.images.lease import OutputInUseError, lease
from cnnray.images.manifest import ManifestError
from cnnray.models import bundle as bundles
from cnnray.models import engines, formats, graph_decode, runtimes, verification
from cnnray.models.answers import Decision, Threshold
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.engines import RUNNERS
from cnnray.models.export import ExportConfig, ExportError, export
from cnnray.models.formats import FORMATS
from cnnray.models.predictor import Predictor
from tests.awkward import awkward_images, bad_images
from tests.networks import CLASSES, coloured_noise, fitted, save_cut
from tests.unit.test_models import TESTED

SIZE = 32
NAMES = ["red", "green", "blue"]
FLOAT_ENGINES = [name for name, runner in RUNNERS.items() if runner.tolerance and name in engines.ENGINES]


def _write_images(folder, count=96, seed=1):
    images, targets = coloured_noise(count, SIZE, seed)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        path = folder / NAMES[target] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_SECONDS_PER_ROUND", 0.0)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of labelled images of three classes."""
    return _write_images(tmp_path_factory.mktemp("colours"))


def _save(folder, architecture, **info):
    model = fitted(architecture, SIZE, *coloured_noise(192, SIZE))
    stated = BundleInfo(class_names=NAMES, image_size=SIZE, architecture=architecture)
    bundles.save(model, dataclasses.replace(stated, **info), folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data):
    """A bundle of `small_cnn` in every format, and the result of its export."""
    folder = tmp_path_factory.mktemp("exported")
    _save(folder, "small_cnn", temperature=1.5)
    formats = [*FORMATS, "keras-bfloat16"]
    return folder, export(ExportConfig(bundle=str(folder), calibration=str(data), formats=formats))


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of that bundle, for tests that change it."""
    return Path(shutil.copytree(exported[0], tmp_path / "bundle"))


def _digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


LARGE = ("resnet50", "vgg16", "efficientnetb0", "efficientnetv2b0")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.long if name in LARGE else ()) for name in TESTED if name != "small_cnn"],
)
def test_every_architecture_to_every_format(architecture, data, tmp_path):
    _save(tmp_path, architecture)
    reports = export(ExportConfig(bundle=str(tmp_path), calibration=str(data), calibration_images=48))["formats"]
    assert list(reports) == list(FORMATS)
    for name, report in reports.items():
        assert report["accuracy"] >= 0.99
        assert (tmp_path / report["path"]).exists()
        assert report["max_difference"] <= (RUNNERS[name].tolerance or 0.5)
    weights = reports["litert"]["bytes"]
    assert reports["litert-float16"]["bytes"] < 0.6 * weights
    assert reports["litert-int8"]["bytes"] < 0.4 * weights
    assert reports["onnx-int8"]["bytes"] < 0.4 * weights


def test_the_files_and_reports_of_an_export(exported):
    folder, summary = exported
    assert summary["bundle"] == str(folder)
    reports = json.loads((folder / "bundle.json").read_text())["exports"]
    assert list(summary["formats"]) == [*FORMATS, "keras-bfloat16"]
    on_other_engines = {"keras", "openvino-bfloat16", "openvino-int8"}
    assert reports == summary["formats"] | {name: reports[name] for name in on_other_engines & set(reports)}
    for report in reports.values():
        path = folder / report["path"]
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert report["bytes"] == sum(file.stat().st_size for file in files)
        assert (report["accuracy"], report["images"], report["temperature"]) == (1.0, 96, 1.5)
        assert set(report["images_per_second"]) == set(report["times_keras"]) == {"1", "32"}
        assert (report["keras_accuracy"], report["threads"]) == (1.0, usable_cpus())
    table = (folder / "export.md").read_text().splitlines()
    assert {line.split("|")[1].strip() for line in table[2:]} >= {"keras", *FORMATS, "openvino-int8"}
    assert {path.name for path in folder.iterdir()} == {
        "bundle.json", "export.md", "model.keras", *(format_.path for format_ in FORMATS.values()),
    }  # fmt: skip


PROGRAMS = {
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
        (probabilities,) = session.run(["probabilities"], {"image": images})
        metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    """,
    "litert": """
        import zipfile
        from ai_edge_litert.interpreter import Interpreter
        interpreter = Interpreter(f"{folder}/model.tflite")
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, images)
        interpreter.invoke()
        probabilities = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        metadata = json.loads(zipfile.ZipFile(f"{folder}/model.tflite").read("cnnray.json"))
    """,
    "saved_model": """
        import tensorflow as tf
        loaded = tf.saved_model.load(f"{folder}/saved_model")
        answers = loaded.signatures["serving_default"](image=images)
        probabilities = answers["probabilities"].numpy()
        assert answers["class_names"].numpy().tolist() == [[b"red", b"green", b"blue"]] * len(images)
        encoded = [tf.io.encode_png(image).numpy() for image in images]
        from_bytes = loaded.signatures["encoded"](image_bytes=tf.constant(encoded))["probabilities"].numpy()
        assert np.abs(from_bytes - probabilities).max() < 1e-6
        metadata = json.load(open(f"{folder}/saved_model/assets.extra/cnnray.json"))
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_files_run_without_cnnray(name, exported, tmp_path):
    folder, _ = exported
    images, _ = coloured_noise(9, SIZE, seed=2)
    expected = Predictor(Bundle.load(str(folder))).probabilities(images)
    np.savez(tmp_path / "images.npz", images=images, expected=expected)
    program = "\n".join(
        [
            "import json, sys\nimport numpy as np",
            f"folder, saved = {str(folder)!r}, np.load({str(tmp_path / 'images.npz')!r})",
            "images = saved['images']",
            *(line.removeprefix(" " * 8) for line in PROGRAMS[name].splitlines()),
            "assert np.abs(probabilities - saved['expected']).max() < 1e-5",
            "assert metadata['class_names'] == ['red', 'green', 'blue'], metadata",
            "assert (metadata['image_size'], metadata['resize']) == (32, 'stretch'), metadata",
            "assert metadata['temperature'] == 1.5, metadata",
            "assert 'uint8' in metadata['preprocessing']",
            "assert not any(name.startswith('cnnray') for name in sys.modules)",
        ]
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_awkward_images_through_every_engine(exported):
    images = [data for pair in zip(awkward_images().values(), _cycled_bad(), strict=False) for data in pair]
    bundle = Bundle.load(str(exported[0]))
    expected = Predictor(bundle)(images)
    for name in bundle.info.exports.keys() & set(engines.ENGINES):
        answers = Predictor(bundle, engine=name)(images)
        assert [isinstance(answer, BadImage) for answer in answers] == [False, True] * (len(images) // 2)
        pairs = list(zip(answers[0::2], expected[0::2], strict=True))
        differences = [np.abs(answer.probabilities - wanted.probabilities).max() for answer, wanted in pairs]
        if name in FLOAT_ENGINES:
            assert max(differences) <= RUNNERS[name].tolerance
            assert all(answer.label == wanted.label for answer, wanted in pairs)
        else:  # int8 is calibrated on other images than these
            assert np.median(differences) <= 0.1


def _cycled_bad():
    bad = [data for data, _ in bad_images().values()]
    return [bad[index % len(bad)] for index in range(len(awkward_images()))]


def _skip_without_bfloat16(name, bundle):
    if name == "openvino-bfloat16" and name not in bundle.info.exports:
        pytest.skip("this CPU does not compute in bfloat16")


@pytest.mark.parametrize("name", engines.ENGINES)
def test_answers_do_not_depend_on_the_grouping(name, exported):
    _skip_without_bfloat16(name, Bundle.load(str(exported[0])))
    predictor = Predictor(Bundle.load(str(exported[0])), engine=name)
    images, _ = coloured_noise(75, SIZE, seed=3)
    together = predictor.probabilities(images)
    assert together.dtype == np.float32
    assert together.shape == (75, CLASSES)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    for size in (1, 7, 33):
        parts = [predictor.probabilities(images[start : start + size]) for start in range(0, 75, size)]
        # The order of sums decides how bfloat16 rounds them.
        np.testing.assert_allclose(np.concatenate(parts), together, atol=1e-2 if "bfloat16" in name else 1e-5)
    assert predictor.probabilities(images[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("name", FLOAT_ENGINES)
def test_engines_follow_a_temperature_that_was_fitted_after_the_export(name, copy):
    bundle = Bundle.load(str(copy))
    bundles.write_info(str(copy), dataclasses.replace(bundle.info, temperature=4.0))
    changed = Bundle.load(str(copy))
    images, _ = coloured_noise(9, SIZE, seed=4)
    expected = Predictor(changed).probabilities(images)
    assert np.abs(expected - Predictor(bundle).probabilities(images)).max() > 0.01
    probabilities = Predictor(changed, engine=name).probabilities(images)
    np.testing.assert_allclose(probabilities, expected, atol=RUNNERS[name].tolerance)


# -- refusals ------------------------------------------------------------------------------------------


def _write_wrong(network, path, write=FORMATS["onnx"].write):
    """Writes a file of the network with its classes in another order."""
    logits = network.bundle.model.get_layer("logits")
    kernel, bias = logits.get_weights()
    logits.set_weights([kernel[:, ::-1], bias[::-1]])
    write(formats.Network(network.bundle, network.calibration), path)
    logits.set_weights([kernel, bias])


@pytest.mark.parametrize(
    ("name", "labelled", "sentence"),
    [
        ("onnx", True, r"onnx was refused: a probability differs from Keras's by .*, more than 0.0001"),
        ("onnx-int8", True, r"onnx-int8 was refused: accuracy 0\.\d+ instead of 1.0000"),
        ("onnx-int8", False, r"onnx-int8 was refused: agreement with Keras 0\.\d+ instead of 1.0000"),
    ],
)
def test_a_format_with_other_answers_is_refused_and_deleted(
    name, labelled, sentence, data, copy, monkeypatch, tmp_path
):
    monkeypatch.setitem(FORMATS, name, dataclasses.replace(FORMATS[name], write=_write_wrong))
    if not labelled:
        shutil.copytree(data / "red", tmp_path / "flat")
        for other in ("green", "blue"):
            shutil.copytree(data / other, tmp_path / "flat", dirs_exist_ok=True)
        data = tmp_path / "flat"
    before = _digests(copy)
    with pytest.raises(ExportError, match=sentence):
        export(ExportConfig(bundle=str(copy), calibration=str(data), formats=[name, "litert"]))
    assert not (copy / FORMATS[name].path).exists()
    exports = Bundle.load(str(copy)).info.exports
    assert name not in exports
    assert (exports["litert"]["accuracy"] is None) != labelled
    assert f"| {name} | refused" in (copy / "export.md").read_text()
    others = [path for path in before if path not in ("bundle.json", "export.md", "model.tflite", FORMATS[name].path)]
    assert {path: _digests(copy)[path] for path in others} == {path: before[path] for path in others}


def _fail_to_write(network, path):
    path.write_bytes(b"a part")
    raise RuntimeError("an operation that\n is not known")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_format_that_cannot_be_converted_is_refused_and_the_others_are_kept(earlier, data, copy, monkeypatch):
    if not earlier:
        (copy / "model.onnx").unlink()
        info = Bundle.load(str(copy)).info
        bundles.write_info(str(copy), dataclasses.replace(info, exports={}))
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write=_fail_to_write))
    with pytest.raises(ExportError, match="onnx was refused: it cannot be converted: an operation that is not known"):
        export(ExportConfig(bundle=str(copy), calibration=str(data), formats=["onnx", "litert"]))
    # A verified file of an earlier export stays.
    assert (copy / "model.onnx").exists() == earlier
    assert ("onnx" in Bundle.load(str(copy)).info.exports) == earlier
    Predictor(Bundle.load(str(copy)), engine="litert")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        tf.errors.ResourceExhaustedError(None, None, "x; No space left on device"),
    ],
)
def test_a_full_disk_leaves_the_bundle_as_it_was(error, data, copy, monkeypatch):
    def run_out_of_space(network, path):
        raise error

    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], write=run_out_of_space))
    before = _digests(copy)
    with pytest.raises(OSError, match="No space left"):
        export(ExportConfig(bundle=str(copy), calibration=str(data), formats=["onnx"]))
    assert _digests(copy) == before


def test_the_signature_for_encoded_images_is_verified_too(data, copy, monkeypatch):
    monkeypatch.setattr(graph_decode, "decode", lambda data, geometry: tf.zeros(geometry.image_size.shape, tf.uint8))
    with pytest.raises(ExportError, match="saved_model was refused: a probability differs from Keras's by"):
        export(ExportConfig(bundle=str(copy), calibration=str(data), formats=["saved_model"]))
    assert not (copy / "saved_model").exists()


@pytest.mark.parametrize("case", ["missing", "empty", "unreadable", "other classes", "one class", "one label more"])
def test_bad_calibration_data_leave_the_bundle_as_it_was(case, data, copy, tmp_path):
    folder, sentence = tmp_path / "calibration", "does not exist"
    if case == "empty":
        folder.mkdir()
        sentence = "holds no images"
    if case == "unreadable":
        for name in NAMES:
            (folder / name).mkdir(parents=True)
            (folder / name / "1.png").write_bytes(b"nothing")
        sentence = r"no image can be read; the first is .*blue/1.png \(not an image"
    if case == "other classes":
        for name in NAMES:
            shutil.copytree(data / name, folder / f"dark {name}")
        sentence = "has the label 'dark blue', which is not a class of"
    if case == "one class":
        shutil.copytree(data / "red", folder / "violet")
        sentence = r"has one class only \(violet\)"
    if case == "one label more":
        shutil.copytree(data, folder)
        shutil.copytree(data / "red", folder / "violet")
        sentence = "has the label 'violet', which is not a class of"
    before = _digests(copy)
    with pytest.raises(ManifestError, match=sentence):
        export(ExportConfig(bundle=str(copy), calibration=str(folder)))
    assert _digests(copy) == before


@pytest.mark.parametrize(
    "arguments",
    [["litert", "onnx"], ["litert,onnx"], ["litert, onnx"], ["litert,", "onnx"], ["onnx,litert", "onnx"]],
)
def test_formats_are_a_list_or_separated_by_commas(arguments, tmp_path):
    common = ["--bundle", "/b", "--calibration", "/c"]
    assert parse(ExportConfig, "export", [*common, "--formats", *arguments]).formats == ["onnx", "litert"]
    assert ExportConfig(bundle="/b", calibration="/c", formats=",".join(arguments)).formats == ["onnx", "litert"]
    assert parse(ExportConfig, "export", common).formats == list(FORMATS)
    for value in (arguments, ",".join(arguments)):
        (tmp_path / "export.yaml").write_text(json.dumps({"bundle": "/b", "calibration": "/c", "formats": value}))
        config = parse(ExportConfig, "export", ["--config", str(tmp_path / "export.yaml")])
        assert config.formats == ["onnx", "litert"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"formats": ["onnx", "onx"]}, "--formats 'onx' is unknown; expected some of saved_model"),
        ({"formats": []}, "--formats is empty; expected some of saved_model"),
        ({"calibration_images": 0}, "--calibration-images must be at least 1"),
        ({"max_accuracy_drop": 2}, "--max-accuracy-drop"),
        ({"threads": 0}, "--threads"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"bundle": "ftp://x"}, "neither a local path nor"),
    ],
)
def test_invalid_flags_are_refused(changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        ExportConfig(**{"bundle": "/b", "calibration": "/c"} | changes)


def test_missing_engines_are_named(copy):
    with pytest.raises(BundleError, match="The engine 'tensorrt' is unknown; expected one of keras, keras-bf"):
        Predictor(Bundle.load(str(copy)), engine="tensorrt")
    (copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"lists an export to onnx, but holds no model\.onnx"):
        Predictor(Bundle.load(str(copy)), engine="onnx")
    (copy / "model.tflite").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"model\.tflite cannot be loaded"):
        Predictor(Bundle.load(str(copy)), engine="litert")
    info = Bundle.load(str(copy)).info
    bundles.write_info(str(copy), dataclasses.replace(info, exports={}))
    with pytest.raises(BundleError, match=r"was not exported to litert-int8 \(it has keras\): run jobs/export.py"):
        Predictor(Bundle.load(str(copy)), engine="litert-int8")
    bundles.write_info(str(copy), dataclasses.replace(info, class_names=["a", "b"]))
    with pytest.raises(BundleError, match="gives 3 probabilities; the bundle has images of 32x32 and 2 classes"):
        Predictor(Bundle.load(str(copy)), engine="onnx-int8")


def test_auto_chooses_the_fastest_verified_engine(exported, caplog):
    bundle = Bundle.load(str(exported[0]))

    def with_speeds(labelled=True, **speeds):
        accuracy = 1.0 if labelled else None
        exports = {
            name.replace("_", "-"): {"accuracy": accuracy, "times_keras": {"1": single, "32": batched}}
            for name, (single, batched) in speeds.items()
        }
        return dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, exports=exports))

    fast = {"onnx": (20, 60), "onnx_int8": (30, 90), "litert_int8": (40, 80)}
    measured = with_speeds(keras=(1, 50), keras_bfloat16=(2, 20), **fast)
    assert engines.choose(measured, gpus=False, batch_size=32) == "onnx-int8"
    assert engines.choose(measured, gpus=False, batch_size=1) == "litert-int8"
    assert engines.choose(measured, gpus=True, batch_size=32) == "keras-bfloat16"
    assert engines.choose(with_speeds(keras=(1, 50), **fast), gpus=True, batch_size=32) == "keras"
    not_verified = with_speeds(False, keras=(1, 50), keras_bfloat16=(2, 20))
    assert engines.choose(not_verified, gpus=True, batch_size=32) == "keras"
    caplog.set_level("INFO")
    unlabelled = with_speeds(
        False, keras=(1, 50), onnx=(20, 60), onnx_int8=(30, 90), saved_model=(99, 99), openvino_bfloat16=(70, 70)
    )
    assert engines.choose(unlabelled, gpus=False, batch_size=64) == "onnx"
    assert (
        "engine onnx: the fastest in export's measurement at batch 32 (times Keras: onnx 60.00, keras 50.00)"
        in caplog.text
    )
    assert engines.choose(with_speeds(), gpus=False, batch_size=32) == "keras"


def test_keras_in_bfloat16_computes_its_layers_in_it_and_leaves_the_model_as_it_is(exported):
    bundle = Bundle.load(str(exported[0]))
    images, _ = coloured_noise(40, SIZE, seed=5)
    expected, rounded = (Predictor(bundle, engine=name).probabilities(images) for name in ("keras", "keras-bfloat16"))
    assert 0 < np.abs(rounded - expected).max() < 0.1
    assert (rounded.argmax(1) == expected.argmax(1)).all()
    assert {layer.compute_dtype for layer in bundle.model.layers} <= {"float32", "uint8"}
    assert (Predictor(bundle).probabilities(images) == expected).all()


def test_keras_gets_the_next_batch_before_the_outputs_of_one_are_waited_for(exported, monkeypatch):
    engine = engines.load_engine(Bundle.load(str(exported[0])), "keras")
    images, _ = coloured_noise(11, SIZE, seed=6)
    expected, calls, start, outputs = engine(images), [], engine._start, runtimes._outputs
    monkeypatch.setattr(engine, "_start", lambda batch: (calls.append(len(batch)), start(batch))[1])
    monkeypatch.setattr(runtimes, "_outputs", lambda *started: (calls.append("waited"), outputs(*started))[1])
    probabilities = engines.predict_in_batches(engine, images, 4)
    assert calls == [4, 4, "waited", 3, "waited", "waited"]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(("given", "can"), [("0", True), ("0", False), ("", True), ("NoDevFiles", True)])
def test_onnx_runtime_uses_a_gpu_that_the_process_was_given(given, can, exported, monkeypatch):
    """With ONNX Runtime's package for CUDA mocked: this machine has no GPU."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            asked.append(providers)
            super().__init__(path, options, providers=providers[-1:])

    asked, cpu = [], "CPUExecutionProvider"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"] * can + [cpu])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("preloaded"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    engines.load_engine(Bundle.load(str(exported[0])), "onnx")
    on_gpu = ["preloaded", [("CUDAExecutionProvider", {"use_tf32": "0"}), cpu]]
    assert asked == (on_gpu if given == "0" and can else [[cpu]])


def test_engines_whose_library_is_missing_are_named_and_not_chosen(exported, monkeypatch):
    bundle = Bundle.load(str(exported[0]))
    unavailable = dataclasses.replace(RUNNERS["openvino-int8"], why_unavailable=lambda: "it is not installed")
    monkeypatch.setitem(RUNNERS, "openvino-int8", unavailable)
    with pytest.raises(BundleError, match=r"openvino-int8 cannot be used here: it is not installed\."):
        Predictor(bundle, engine="openvino-int8")
    fast = {"accuracy": 1.0, "times_keras": {"1": 9e9, "32": 9e9}}
    fastest = dataclasses.replace(bundle.info, exports=bundle.info.exports | {"openvino-int8": fast})
    chosen = engines.choose(dataclasses.replace(bundle, info=fastest), gpus=False, batch_size=32)
    assert chosen != "openvino-int8"


def test_an_export_is_refused_while_another_run_writes_to_the_bundle(data, copy, exported):
    before = _digests(copy)
    with lease(str(copy)):
        with pytest.raises(OutputInUseError, match="Another run is writing to"):
            export(ExportConfig(bundle=str(copy), calibration=str(data), formats=["onnx"]))
        bundles.replace(str(copy), str(exported[0]))
        assert (copy / ".lock").exists()
    assert _digests(copy) == before


def test_images_that_are_cut_to_a_rectangle_get_the_same_answers_from_every_file(data, tmp_path):
    save_cut(tmp_path)
    # The SavedModel is verified on encoded images, too.
    export(ExportConfig(bundle=str(tmp_path), calibration=str(data), formats=["saved_model", "onnx", "litert"]))
    bundle, images = Bundle.load(str(tmp_path)), list(awkward_images().values())
    expected = np.stack([answer.probabilities for answer in Predictor(bundle)(images)])
    assert expected.std(0).max() > 0.1
    for name in ("onnx", "litert"):
        answers = np.stack([answer.probabilities for answer in Predictor(bundle, engine=name)(images)])
        assert np.abs(answers - expected).max() <= RUNNERS[name].tolerance
    metadata = json.loads((tmp_path / "saved_model/assets.extra/cnnray.json").read_text())
    assert (metadata["image_size"], metadata["resize"], metadata["decode_size"]) == ("24x36", "crop", "28x40")
    assert "to decode_size, and image_size cut out of the centre" in metadata["preprocessing"]


def test_metadata_names_the_architecture_and_the_classes(exported):
    metadata = formats.metadata(Bundle.load(str(exported[0])))
    assert metadata["architecture"] == "small_cnn"
    assert metadata["class_names"] == NAMES


def test_a_saved_model_says_of_which_images_the_bundle_is_unsure(data, copy):
    bundle = Bundle.load(str(copy))
    images, _ = coloured_noise(40, SIZE, seed=4)
    images = images // 4 + 96  # with less colour, and so less sure
    probabilities = Predictor(bundle).probabilities(images)
    middle = np.sort(probabilities.max(1))[20:22].mean()
    threshold = Threshold(confidence=float(middle), candidate=0.2, images=40, coverage=0.5, observed_precision=1.0)
    threshold = dataclasses.replace(threshold, group=float(middle), group_below=float(middle))
    decision = Decision(precision=0.9, certainty=0.95, candidate_coverage=0.95, thresholds={"float32": threshold})
    groups = {name: "first" if name == NAMES[0] else "others" for name in NAMES}
    bundles.write_info(str(copy), dataclasses.replace(bundle.info, decision=decision, groups=groups))
    export(ExportConfig(bundle=str(copy), calibration=str(data), formats=["saved_model"]))
    outputs = tf.saved_model.load(str(copy / "saved_model")).signatures["serving_default"](image=images)
    assert outputs["unsure"].numpy().tolist() == threshold.is_unsure(probabilities).tolist()
    assert outputs["unsure"].numpy().sum() == 21
    candidates = [np.flatnonzero(row) for row in outputs["candidates"].numpy()]
    rules = engines.find_rules(Bundle.load(str(copy)), "keras")
    answers = rules(probabilities)
    for answer, found in zip(answers, candidates, strict=True):
        assert sorted(answer.candidates or answer.labels) == found.tolist()
    named = [rules.group_name(answer) or "" for answer in answers]
    assert [name.decode() for name in outputs["group"].numpy()] == named
    assert {"", "others"} <= set(named)
    assert formats.metadata(Bundle.load(str(copy)))["decision"]["thresholds"]["float32"]["candidate"] == 0.2
