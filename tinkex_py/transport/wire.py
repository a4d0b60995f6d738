"""The protobuf messages of the Tinker wire (`tinker_public.proto`), as Python classes.

The schema is loaded into a descriptor pool of its own, so that this package and the official
`tinker` SDK, which registers the same message names, can live in one process.
`wire.pyi` lists the classes for type checkers; both files are made from `tinker_public.proto`
(CONTRIBUTING.md has the command).
"""

from importlib.resources import files

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def _load() -> dict[str, object]:
    schema = descriptor_pb2.FileDescriptorSet()
    schema.ParseFromString((files(__package__) / "tinker_public.desc").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    names: dict[str, object] = {}
    for file in schema.file:
        pool.Add(file)
        for message in file.message_type:
            descriptor = pool.FindMessageTypeByName(f"{file.package}.{message.name}")
            names[message.name] = message_factory.GetMessageClass(descriptor)
        for enum in file.enum_type:
            names.update({value.name: value.number for value in enum.value})
    return names


globals().update(_load())
