"""Write metrics, settings and samples as TensorBoard's event files, by its own writer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from lora_exp.tracking.flat import as_markdown, flat
from lora_exp.tracking.tracker import RunInfo


class TensorBoard:
    """Event files in a folder; torch and TensorFlow are not needed for them."""

    label: ClassVar[str] = "TensorBoard"

    def __init__(
        self,
        folder: str | None,
        *,
        run: RunInfo,
    ) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        path = Path(folder) / f"{run.name}-{run.id}" if folder else run.directory / "tensorboard"
        self.writer, self.info = EventFileWriter(str(path)), run
        self.place = f"tensorboard --logdir {folder or path}"

    def describe(self, facts: dict[str, Any]) -> None:
        """Write the config and the facts as hyperparameters."""
        from tensorboard.plugins.hparams import summary_v2

        pairs = flat(self.info.config | {"run": facts})
        self._write(summary_v2.hparams_pb(pairs, trial_id=self.info.name), 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the metrics of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Summary(value=values), step)

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        """Write the answers before and after training as a text."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text import metadata
        from tensorboard.util import tensor_util

        text = as_markdown(samples)
        value = Summary.Value(
            tag="samples",
            metadata=metadata.create_summary_metadata("samples", ""),
            tensor=tensor_util.make_tensor_proto([text.encode()]),
        )
        self._write(Summary(value=[value]), step)

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        """Write the numbers of the whole run as `summary/...`, and close."""
        numbers = {f"summary/{k}": float(v) for k, v in summary.items() if v is not None}
        self.log(numbers, int(summary.get("steps") or 0))
        self.writer.close()

    def _write(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
