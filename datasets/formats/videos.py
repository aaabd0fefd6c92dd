"""Reads and writes videos frame by frame with PyAV, within bounds: only files of video, only frames of the size that is
expected, and no more of them than are asked for.

Knows videos. Knows no layout of a dataset.
"""

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import open_regular
from diffusion_policy.datasets.formats.reading import library
from diffusion_policy.datasets.storage import StoreError

CODECS = {"h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4"}
"""That are decoded."""
FORMATS = {1: "gray", 3: "rgb24"}
"""Of a frame with so many channels."""
FAR = 5.0
"""Seconds from which on it is faster to jump to the next key frame than to decode what lies between."""
KEY_FRAMES = 2
"""A key frame every so many frames, as LeRobot has it: any frame is decoded at once."""
QUALITY = 18
"""Constant rate factor of H.264: 0 is lossless, 51 the worst."""


def video_library() -> Any:
    """PyAV; raises StoreError where it is absent."""
    return library("av", "videos", "video")


class VideoReader:
    """The frames of one file, in the order of time. A context manager."""

    def __init__(self, path: Path, name: str, shape: tuple[int, int, int], rate: float) -> None:
        """`name`: what it is called in errors; `shape`: (height, width, channels) of its frames; `rate` [Hz]. Raises
        StoreError for what cannot be such a video."""
        self._av = video_library()
        self._name, self._shape, self._rate = name, shape, rate
        self._stack = contextlib.ExitStack()
        try:
            with self._errors("cannot be opened"):
                file = self._stack.enter_context(open_regular(path))
                # No other demuxer: playlists, for one, name files and servers.
                self._container = self._stack.enter_context(self._av.open(file, format="mov"))
                self._stream = self._container.streams.video[0]
            self._require_size()
        except BaseException:
            self._stack.close()
            raise
        self._frames: Iterator[Any] = iter(())
        self._frame: Any = None
        self._ahead: Any = None
        """The one after it."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, start: float, count: int) -> np.ndarray:
        """The `count` frames from `start` [s] on, (count, height, width, channels) uint8; raises StoreError where there
        are fewer, and for damage."""
        frames = np.empty((count, *self._shape), np.uint8)
        if self._frame is None or not self._frame.time <= start <= self._frame.time + FAR:
            self._seek(start)
        for i in range(count):
            frame = self._nearest(start + i / self._rate)
            if frame is None:
                raise StoreError(
                    f"{self._name} is shorter than its episode: {count} frames are needed from {start:.3f} s on, one "
                    f"every {1 / self._rate:.3f} s; {i} were found"
                )
            with self._errors("cannot be decoded"):
                frames[i] = frame.to_ndarray(format=FORMATS[self._shape[2]]).reshape(self._shape)
        return frames

    def _nearest(self, time: float) -> Any:
        """The frame that is nearest to a time; None where none is within half a period of it."""
        while self._ahead is not None and (
            self._frame is None or abs(self._ahead.time - time) <= abs(self._frame.time - time)
        ):
            self._frame, self._ahead = self._ahead, self._next()
        near = self._frame is not None and abs(self._frame.time - time) < 0.5 / self._rate
        return self._frame if near else None

    def _next(self) -> Any:
        """The next frame, its size checked; None behind the last."""
        with self._errors("cannot be decoded"):
            frame = next(self._frames, None)
        if frame is None:
            return None
        if (frame.height, frame.width) != self._shape[:2] or frame.time is None:
            found = f"{frame.height} x {frame.width}" if frame.time is not None else "without a time"
            raise StoreError(f"{self._name} has a frame {found}; all should be {self._shape[0]} x {self._shape[1]}")
        return frame

    def _seek(self, time: float) -> None:
        with self._errors("cannot be decoded"):
            offset = max(0, math.floor((time - 0.5 / self._rate) / self._stream.time_base))
            self._container.seek(offset, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        self._frame, self._ahead = None, self._next()

    def _require_size(self) -> None:
        """Raise StoreError for another size than expected, or an unknown codec, before a frame is decoded."""
        context, (height, width, _) = self._stream.codec_context, self._shape
        if context is None or context.name not in CODECS:
            known = ", ".join(sorted(CODECS))
            raise StoreError(f"{self._name} is encoded with {getattr(context, 'name', 'no codec')}; known are {known}")
        if (context.height, context.width) != (height, width):
            found = f"{context.height} x {context.width}"
            raise StoreError(f"{self._name} has frames of {found}; meta/info.json says {height} x {width}")
        context.options = {"max_pixels": str((height + 512) * (width + 512))}  # should it say otherwise later
        context.thread_type = "AUTO"

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Name the video in whatever the library raises."""
        try:
            yield
        except StoreError:
            raise
        except (self._av.FFmpegError, OSError, ValueError, IndexError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(f"{self._name} {what}: {said}") from error


class VideoWriter:
    """Writes frames to an H.264 file. A context manager; the file is whole when it is closed."""

    def __init__(self, path: Path, shape: tuple[int, int, int], rate: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        av = video_library()
        self._path, self._channels = path, shape[2]
        self._av, self._container = av, av.open(str(path), "w", format="mp4")
        options = {"crf": str(QUALITY), "g": str(KEY_FRAMES), "bf": "0"}
        self._stream = self._container.add_stream("libx264", Fraction(rate).limit_denominator(10_000), options=options)
        self._stream.height, self._stream.width = shape[:2]
        self._stream.pix_fmt = pixel_format(shape)
        self.frames = 0
        """Written so far."""

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def bytes(self) -> int:
        """Size of the file so far, without what the encoder holds back."""
        return self._path.stat().st_size

    def add(self, rows: np.ndarray) -> None:
        """Append frames (frames, height, width, channels) uint8, the first of which is a key frame."""
        for i, row in enumerate(rows):
            image = row[..., 0] if self._channels == 1 else row
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=FORMATS[self._channels])
            frame.pts = self.frames
            frame.pict_type = self._av.video.frame.PictureType.I if i == 0 else self._av.video.frame.PictureType.NONE
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Write what the encoder holds back, and the index."""
        self._container.mux(self._stream.encode())
        self._container.close()


def pixel_format(shape: tuple[int, int, int]) -> str:
    """How the pixels of a video lie: with colours of half the resolution where that goes, as every player reads it."""
    return "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
