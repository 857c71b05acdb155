"""The verb `predict` as a script: python launch/predict.py [--config FILE] [key=value ...]."""

from torch.distributed.elastic.multiprocessing.errors import record

from hetegen_rec.cli import launch


@record
def main() -> None:
    launch("predict")


if __name__ == "__main__":
    main()
