"""The errors of this room."""


class DataError(ValueError):
    """The data are not what the configuration says. The message names the place and the fix."""


class BadRowsError(DataError):
    """Some raw rows cannot be used; without them (`data.on_bad_shard: skip`) the others can."""


class PreparedAnewError(DataError):
    """Other encoded rows than a run's were read, from the place in its argument.

    Their ids are not those of the run's model, so `data.on_bad_shard: skip` passes over none of them.
    """

    def __str__(self) -> str:
        return (
            f"{self.args[0]}: was prepared anew while it was read; give each schema and each set of raw "
            "files its own `data.prepared_dir`, and start again"
        )
