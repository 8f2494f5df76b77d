from __future__ import annotations

import sys

from crate_mae.cli import main

sys.exit(main())
