"""The verb `pretrain` as a script: python launch/pretrain.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("pretrain")


if __name__ == "__main__":
    main()
