"""What S3 and botocore say, in one line each that tells what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dtp_trainer.storage import NotFound, StorageError, Unreadable

_MISSING = ("NoSuchKey", "404", "NotFound")
_CONDITION = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_DENIED = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
_CREDENTIALS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
_ELSEWHERE = ("301", "AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocation")
_BUSY = (
    "500",
    "502",
    "503",
    "504",
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
)
_ACTIONS = {
    "read": "GetObject",
    "write": "PutObject",
    "list": "ListBucket",
    "delete": "DeleteObject",
}


@contextmanager
def explained(verb: str, key: str, uri: str) -> Iterator[None]:
    """Raises `StorageError`, `NotFound` or `Unreadable` in place of botocore's exceptions."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        told = _translated(error, verb, key, uri)
        if told is None:
            raise
        raise told from error


def code_of(error: Exception) -> str:
    """S3's word for what went wrong; empty for an error that is not S3's."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def refused_condition(error: Exception) -> bool:
    """The object is not the one that a conditional request named."""
    return code_of(error) in (*_CONDITION, *_MISSING)


def broken_body(error: Exception) -> bool:
    """The answer came, its content did not, or not as it was sent."""
    from botocore import exceptions as b  # noqa: PLC0415 - loaded with the client
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - which botocore lets through here

    kinds = (b.IncompleteReadError, b.ResponseStreamingError, b.FlexibleChecksumError, HTTPError)
    return isinstance(error, kinds)


def _translated(error: Exception, verb: str, key: str, uri: str) -> StorageError | None:
    """None for an error that has nothing to do with S3."""
    from botocore import exceptions as b  # noqa: PLC0415 - loaded with the client

    what = f"cannot {verb} {key} in {uri}"
    if isinstance(error, b.ClientError):
        return _refusal(error, verb, key, uri)
    if isinstance(error, b.HTTPClientError | b.ConnectionError):
        where = getattr(error, "kwargs", {}).get("endpoint_url") or "S3"
        return StorageError(f"{what}: {where} does not answer; check the network, AWS_ENDPOINT_URL")
    if isinstance(error, b.ParamValidationError):
        return StorageError(f"{what}: S3 allows no such name; s3://bucket/prefix is how it looks")
    if isinstance(error, b.BotoCoreError):
        return StorageError(f"{what}: {_credentials(error) or ' '.join(str(error).split())}")
    return None


def _credentials(error: Exception) -> str:
    from botocore import exceptions as b  # noqa: PLC0415 - loaded with the client

    if isinstance(error, b.NoCredentialsError | b.PartialCredentialsError | b.ProfileNotFound):
        return "no AWS credentials here; run `aws configure`, set AWS_PROFILE, or give it a role"
    kinds = b.CredentialRetrievalError | b.TokenRetrievalError | b.SSOError
    if isinstance(error, kinds):
        return "the AWS credentials cannot be had; run `aws sso login`, or check the role"
    return ""


def _refusal(error: Exception, verb: str, key: str, uri: str) -> StorageError:
    code, bucket = code_of(error), uri.removeprefix("s3://").partition("/")[0]
    what, reading = f"cannot {verb} {key} in {uri}", verb == "read"
    # Read once more, the same would come: another checkpoint is the better choice.
    lasting = Unreadable if reading else StorageError
    if code in _MISSING:
        return NotFound(f"there is no {key} in {uri}")
    if code == "NoSuchBucket":
        return StorageError(f"{what}: there is no bucket {bucket}; create it, or check the name")
    if code in _DENIED:
        action = _ACTIONS.get(verb, "*")
        return lasting(f"{what}: access denied; allow s3:{action} there to who runs this")
    if code in _CREDENTIALS:
        return StorageError(f"{what}: the AWS credentials are refused ({code}); renew them")
    if code in _ELSEWHERE:
        return StorageError(f"{what}: the bucket is in another region; set AWS_REGION to that one")
    if code in _BUSY:
        return lasting(f"{what}: S3 refuses, however often it is asked ({code}); try again later")
    if code == "InvalidObjectState":
        return lasting(f"{what}: it is archived; restore it from Glacier first")
    return lasting(f"{what}: {' '.join(str(error).split())}")
