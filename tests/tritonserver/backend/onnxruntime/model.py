"""Triton's ONNX Runtime backend in Python, for a server that has none: takes the same repository, computes on the CPU."""

import json
import os
import sys

sys.path.insert(0, os.environ["TRITON_SITE_PACKAGES"])  # the server's own interpreter knows no packages

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args):
        """Open the version's model.onnx."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["TRITON_THREADS"])
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")  # noqa: PTH118
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        """Answer requests that came together with one run on all their images."""
        given = [[triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs] for request in requests]
        try:
            images = [np.concatenate(arrays) for arrays in zip(*given, strict=True)]
            found = self.session.run(self.outputs, dict(zip(self.inputs, images, strict=True)))
        except Exception as error:
            return [triton.InferenceResponse(error=triton.TritonError(str(error))) for _ in requests]
        cuts = np.cumsum([len(arrays[0]) for arrays in given])[:-1]
        parts = zip(*(np.split(array, cuts) for array in found), strict=True)
        return [triton.InferenceResponse(list(map(triton.Tensor, self.outputs, arrays))) for arrays in parts]
