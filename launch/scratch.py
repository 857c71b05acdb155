"""The verb `scratch` as a script: python launch/scratch.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("scratch")


if __name__ == "__main__":
    main()
