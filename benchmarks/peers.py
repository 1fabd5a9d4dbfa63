"""Other servers for the same network, as programs: python -m benchmarks.peers NAME BUNDLE ENGINE PORT

Each accepts a form with the field `image`, and answers with the class and its probability. `flask` is the article's
service: a route that opens the image with Pillow, resizes it, and calls `model.predict`. The others have two
processes, each with an engine of one thread, and decode as cnnray does.
"""

import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import REPOSITORY
from cnnray.images.decode import decode
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor

WORKERS = 2


class Classifier:
    """Decodes and classifies images for a peer."""

    def __init__(self) -> None:
        self._bundle = Bundle.load(os.environ["PEER_BUNDLE"])
        self._predictor = Predictor(self._bundle, engine=os.environ["PEER_ENGINE"], threads=1)

    def decode(self, data: bytes) -> Any:
        """Decode an image to pixels, uint8 (size, size, 3)."""
        return decode(data, self._bundle.info.geometry)

    def predict(self, images: list[Any]) -> list[dict[str, Any]]:
        """Classify decoded images."""
        rows, names = self._predictor.probabilities(np.stack(images)), self._bundle.info.class_names
        return [{"prediction": names[row.argmax()], "confidence": float(row.max())} for row in rows]

    def answer(self, data: bytes) -> dict[str, Any]:
        """Classify one encoded image."""
        return self.predict([self.decode(data)])[0]


def flask(port: int) -> None:
    """Run the article's Flask service."""
    import flask as web
    from PIL import Image

    from cnnray.models import startup

    startup.load_tensorflow(gpus=False)
    bundle = Bundle.load(os.environ["PEER_BUNDLE"])
    model, size, names = bundle.model, bundle.info.geometry.image_size, bundle.info.class_names
    app = web.Flask(__name__)

    @app.post("/predict")
    def predict() -> Any:
        image = Image.open(io.BytesIO(web.request.files["image"].read())).convert("RGB").resize(size[::-1])
        (row,) = model.predict(np.asarray(image)[None], verbose=0)
        return web.jsonify({"prediction": names[row.argmax()], "confidence": float(row.max())})

    app.run(port=port, threaded=True)


def fastapi_application() -> Any:
    """Build the FastAPI application in one of uvicorn's processes."""
    from fastapi import FastAPI, UploadFile
    from starlette.concurrency import run_in_threadpool

    app, classifier = FastAPI(), Classifier()

    async def predict(image: UploadFile) -> dict[str, Any]:
        return await run_in_threadpool(classifier.answer, await image.read())

    app.add_api_route("/predict", predict, methods=["POST"])
    return app


def fastapi(port: int) -> None:
    """Run bare FastAPI in uvicorn."""
    import uvicorn

    uvicorn.run(
        "benchmarks.peers:fastapi_application", factory=True, port=port, workers=WORKERS, access_log=False,
        log_level="warning",
    )  # fmt: skip


_LITSERVE = """
import sys
import litserve
from benchmarks.peers import Classifier

class Api(litserve.LitAPI):
    def setup(self, device):
        self.classifier = Classifier()

    def decode_request(self, request):
        return self.classifier.decode(request["image"].file.read())

    def batch(self, inputs):
        return inputs

    def unbatch(self, output):
        return output

    def predict(self, images):
        return self.classifier.predict(images)

    def encode_response(self, output):
        return output

if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
"""

_BENTOML = """
import pathlib
import bentoml
from benchmarks.peers import Classifier

@bentoml.service(workers=WORKERS, traffic={"concurrency": 256}, logging={"access": {"enabled": False}})
class Service:
    def __init__(self):
        self.classifier = Classifier()

    @bentoml.api(route="/predict")
    def predict(self, image: pathlib.Path) -> dict:
        return self.classifier.answer(image.read_bytes())
"""


def litserve(port: int) -> None:
    """Run LitServe with batching."""
    _replace_this_process(_LITSERVE, "lit_service.py", str(port))


def bentoml(port: int) -> None:
    """Run BentoML."""
    _replace_this_process(
        _BENTOML, "bento_service.py", "-m", "bentoml", "serve", "bento_service:Service", "--port", str(port),
        "--host", "127.0.0.1",
    )  # fmt: skip


def _replace_this_process(program: str, name: str, *arguments: str) -> None:
    """Write a program to a file that worker processes can import, and run it in place of this process."""
    file = Path(os.environ["PEER_FOLDER"]) / name
    file.write_text(program.replace("WORKERS", str(WORKERS)))
    command = arguments if arguments[0] == "-m" else (str(file), *arguments)
    path = os.pathsep.join(filter(None, [str(file.parent), os.environ.get("PYTHONPATH")]))
    os.execve(
        sys.executable, [sys.executable, *command], os.environ | {"BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": path}
    )


def install(folder: Path) -> Path:
    """Create an environment for the peers whose requirements conflict with Ray's.

    It sees the packages of the current environment after its own.

    Returns:
        The environment's Python interpreter.
    """
    environment = folder / "peers"
    python = environment / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    finder = environment / "lib" / version / "site-packages" / "cnnray-peers.pth"
    if finder.exists():  # written last, so the environment is complete
        return python
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, "litserve", "bentoml"], check=True)
    finder.write_text("\n".join([sysconfig.get_path("purelib"), str(REPOSITORY)]) + "\n")
    return python


PEERS = {"flask": flask, "fastapi": fastapi, "litserve": litserve, "bentoml": bentoml}

if __name__ == "__main__":
    _, name, os.environ["PEER_BUNDLE"], os.environ["PEER_ENGINE"], port = sys.argv
    PEERS[name](int(port))
