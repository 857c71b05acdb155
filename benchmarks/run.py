"""Measures one scenario: `python -m benchmarks.run NAME`, also under torchrun. See docs/benchmarks.md."""

import sys

from benchmarks.throughput.runner import main

if __name__ == "__main__":
    sys.exit(main())
