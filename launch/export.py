"""The verb `export` as a script: python launch/export.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("export")


if __name__ == "__main__":
    main()
