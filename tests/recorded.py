"""A stand-in for CUDA graphs: what they keep between calls, without CUDA."""

from fedtalos.training.engine.capture import CapturedStep, undone


class Recorded(CapturedStep):
    """A captured step's memory without its graph: inputs in buffers of its own, warm-up steps that are undone."""

    def __init__(self, step, inputs, state):
        self._step, self._inputs = step, [tensor.clone() for tensor in inputs]
        with undone(state):
            for _ in range(2):
                step(*self._inputs)

    def __call__(self, *inputs):
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        return self._step(*self._inputs).clone()
