"""The verb `finetune` as a script: python launch/finetune.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("finetune")


if __name__ == "__main__":
    main()
