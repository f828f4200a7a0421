"""A soak of an S3 server, which itself is killed and frozen while a checkpoint is being saved."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import boto3
from botocore.config import Config
from kills import Soak


class Server(Protocol):
    """What can be done to a server."""

    environment: dict[str, str]

    def start(self) -> None: ...

    def kill(self) -> None: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...


@dataclass(frozen=True)
class Bucket:
    """The objects below a prefix of a bucket (shadow.Objects)."""

    bucket: str
    prefix: str
    client: Any = field(repr=False)

    def sizes(self) -> dict[str, int]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        items = (item for page in pages for item in page.get("Contents", []))
        return {item["Key"].removeprefix(f"{self.prefix}/"): item["Size"] for item in items}

    def read(self, name: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"].read()
        return body


def client_of(environment: Mapping[str, str]) -> Any:
    """A client of the server."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
        config=Config(retries={"total_max_attempts": 5}),
    )


def soak_bucket(
    context: Any, server: Server, place: str, *, ranks: int, seed: int, every: int = 4, frozen_seconds: float = 20.0
) -> Soak:
    """A soak of s3://place, whose server has an outage in one of `every` cycles that wait for a save (0: in none)."""
    bucket, _, prefix = place.partition("/")
    draws = random.Random(seed)
    objects = Bucket(bucket, prefix, client_of(server.environment))
    soak = Soak(context, f"s3://{place}", objects, ranks, draws, environment=dict(server.environment))
    soak.outage = outages(server, soak, every, frozen_seconds)
    return soak


def outages(server: Server, soak: Soak, every: int, frozen_seconds: float) -> Callable[[], str | None]:
    """Kill and restart the server, or freeze it, in one of `every` calls, within the time of a save."""

    def outage() -> str | None:
        if not every or soak.random.randrange(every):
            return None
        time.sleep(soak.random.uniform(0, soak.typical))
        if soak.random.random() < 0.5:
            server.kill()
            time.sleep(soak.random.uniform(0, 3))
            server.start()
            return "killed and restarted"
        server.freeze()
        time.sleep(frozen_seconds)
        server.thaw()
        return f"frozen for {frozen_seconds:g} s"

    return outage
