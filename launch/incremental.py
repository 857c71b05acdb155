"""The verb `incremental` as a script: python launch/incremental.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("incremental")


if __name__ == "__main__":
    main()
