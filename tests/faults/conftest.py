"""The helpers of this folder and the toy federation are importable; Flower's own lines are not wanted."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
logging.getLogger("flwr").setLevel(logging.ERROR)
