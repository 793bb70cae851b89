import pytest
from aiohttp import ClientPayloadError
from aiohttp.http_exceptions import ContentLengthError
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from cellray.data import faults


def refused(status, code):
    """What s3fs raises for an answer of S3."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "GetObject"))


def broken_off():
    """What aiohttp raises for a body that ends too soon: its cause calls that a bad request."""
    error = ClientPayloadError("Response payload is not completed")
    error.__cause__ = ContentLengthError("Not enough data to satisfy content length header")
    return error


def failing(*errors):
    """A call that raises these, one each time, and then returns how often it was made."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return len(errors) + 1

    return call


PASS = [
    refused(500, "InternalError"),
    refused(502, "502"),
    refused(503, "SlowDown"),
    refused(429, "TooManyRequests"),
    refused(409, "ConditionalRequestConflict"),
    refused(400, "RequestTimeout"),
    refused(400, "BadDigest"),
    refused(404, "NoSuchUpload"),
    broken_off(),
    TimeoutError(),
    ConnectionResetError("reset by peer"),
]
STAND = [
    refused(404, "NoSuchKey"),
    refused(403, "AccessDenied"),
    refused(400, "InvalidArgument"),
    refused(412, "PreconditionFailed"),
    refused(416, "InvalidRange"),
    refused(501, "NotImplemented"),
    FileNotFoundError("file"),
    IsADirectoryError("folder"),
    OSError("Forbidden: https://storage.googleapis.com/b/o"),
]


@pytest.mark.parametrize("error", PASS, ids=repr)
def test_what_may_pass_is_tried_again(error):
    assert faults.retried("s3://bucket/a", failing(error)) == 2


@pytest.mark.parametrize("error", STAND, ids=repr)
def test_an_answer_stands(error):
    with pytest.raises(OSError) as found:  # noqa: PT011
        faults.retried("s3://bucket/a", failing(error))
    assert found.value is error


@pytest.mark.parametrize(("status", "again"), [(503, True), (429, True), (400, False), (404, False)])
def test_answers_of_google_are_told_apart(status, again):
    HttpError = pytest.importorskip("gcsfs.retry").HttpError
    call = failing(HttpError({"code": status, "message": "said"}))
    if again:
        assert faults.retried("gs://bucket/a", call) == 2
    else:
        with pytest.raises(HttpError):
            faults.retried("gs://bucket/a", call)


def test_what_does_not_pass_is_given_up_at_the_deadline(monkeypatch, caplog):
    monkeypatch.setattr(faults, "DEADLINE", 0.0)
    with pytest.raises(ConnectionError, match=r"s3://bucket/a could not be reached: 2 tries.*SlowDown"):
        faults.retried("s3://bucket/a", failing(*[refused(503, "SlowDown")] * 9))
    assert len(caplog.messages) == 1
    assert "s3://bucket/a: try 1 failed" in caplog.text


def test_mistakes_of_ours_are_not_tried_again():
    with pytest.raises(ZeroDivisionError):
        faults.retried("s3://bucket/a", failing(ZeroDivisionError()))
