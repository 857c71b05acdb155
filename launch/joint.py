"""The verb `joint` as a script: python launch/joint.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("joint")


if __name__ == "__main__":
    main()
