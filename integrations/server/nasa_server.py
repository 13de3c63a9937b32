"""A server of a diffusers pipeline whose requests have negative prompts, at any guidance scale.

    pip install "nasa-kernels[diffusers]" fastapi uvicorn
    python nasa_server.py --model DIR_OR_ID
    curl -s localhost:8000/images -H 'content-type: application/json' -o cat.png \\
        -d '{"prompt": "a cat", "negative": "blurry", "method": "projected"}'

What matters to a server of your own is `Server.draw`: the lock, and NASA on for one request alone.
"""

import argparse
import io
import threading
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, HTTPException, Response
from nasa_diffusers import nasa
from nasa_diffusers.drawing import method_of
from pydantic import BaseModel, Field


class Wanted(BaseModel):
    prompt: str
    negative: str = ""
    method: str = "nasa"
    strength: float | None = None  # alpha, of nag its scale; None: the family's default
    steps: int = Field(4, ge=1, le=100)
    guidance: float = Field(0.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)


class Server:
    def __init__(self, pipe: Any):
        self.pipe = pipe
        # NASA is on for the network, so one request at a time may draw with it
        self.lock = threading.Lock()

    def draw(self, wanted: Wanted) -> Any:
        with self.lock:
            if not wanted.negative.strip():
                return self.call(wanted)
            # off again at the end, and after an error
            with nasa(self.pipe, wanted.negative, method_of(wanted.method, wanted.strength)):
                return self.call(wanted)

    def call(self, wanted: Wanted) -> Any:
        return self.pipe(
            wanted.prompt,
            num_inference_steps=wanted.steps,
            guidance_scale=wanted.guidance,
            generator=torch.Generator().manual_seed(wanted.seed),
        ).images[0]


def make_app(pipe: Any) -> FastAPI:
    server, app = Server(pipe), FastAPI(title="negative prompts")

    # a plain function: FastAPI runs it in a thread, and the second request waits for the lock
    @app.post("/images")
    def images(wanted: Wanted) -> Response:
        try:
            image = server.draw(wanted)
        except ValueError as error:  # what the caller can correct
            raise HTTPException(422, str(error)) from error
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a diffusers pipeline")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype).to(device)
    uvicorn.run(make_app(model), host=options.host, port=options.port)
