//! The one table that turns errors into gRPC statuses, with etcd's exact codes and texts.

use tonic::{Code, Status};

use crate::{apply::Error, cluster::Refusal, mvcc};

/// A status whose text begins with etcd's prefix.
fn etcd(code: Code, text: &str) -> Status {
    Status::new(code, format!("etcdserver: {text}"))
}

impl From<Error> for Status {
    fn from(e: Error) -> Status {
        match e {
            Error::Compacted | Error::FutureRev | Error::LeaseTtlTooLarge => etcd(Code::OutOfRange, &e.to_string()),
            Error::KeyNotFound | Error::RequestTooLarge => etcd(Code::InvalidArgument, &e.to_string()),
            Error::AlarmAction(_) => etcd(Code::InvalidArgument, &e.to_string()),
            Error::Member(Refusal::NotFound | Refusal::Removed) => etcd(Code::NotFound, &e.to_string()),
            Error::Member(_) | Error::LearnerNotReady | Error::NotLeader => {
                etcd(Code::FailedPrecondition, &e.to_string())
            }
            Error::LeaseNotFound => etcd(Code::NotFound, &e.to_string()),
            Error::LeaseExists => etcd(Code::FailedPrecondition, &e.to_string()),
            Error::NoSpace => etcd(Code::ResourceExhausted, &e.to_string()),
            Error::Corrupt => etcd(Code::DataLoss, &e.to_string()),
            // G-2: etcd's own table misses these two, so they leave as Unknown.
            Error::TooManyRequests | Error::NotEnoughStarted => etcd(Code::Unknown, &e.to_string()),
            Error::Timeout
            | Error::TimeoutLeaderFailed
            | Error::TimeoutConnectionLost
            | Error::TimeoutAppliedIndex
            | Error::Unhealthy
            | Error::LeaderChanged
            | Error::NoLeader
            | Error::Stopped => etcd(Code::Unavailable, &e.to_string()),
            Error::DeadlineExceeded => Status::new(Code::DeadlineExceeded, e.to_string()),
            Error::NotPrimaryLessor | Error::ProposalDropped => Status::new(Code::Unknown, e.to_string()),
            Error::NotImplemented(_) => Status::new(Code::Unimplemented, e.to_string()),
            Error::Storage(_) => Status::new(Code::Internal, e.to_string()),
        }
    }
}

impl From<mvcc::Error> for Status {
    fn from(e: mvcc::Error) -> Status {
        Error::from(e).into()
    }
}

/// A failure of the transport in the words of etcd's gRPC library, which tells a bad request from a bad message of a
/// stream by the beginning. `None`: not one of the transport.
pub fn of_transport(found: &Status, bad_message: &str, limit: usize) -> Option<Status> {
    match (found.code(), found.message()) {
        (Code::OutOfRange, text) if text.starts_with("Error, decoded message length too large") => {
            let size = text.split_whitespace().find_map(|word| word.parse::<usize>().ok()).unwrap_or(0);
            Some(Status::resource_exhausted(format!("grpc: received message larger than max ({size} vs. {limit})")))
        }
        (Code::ResourceExhausted, text) if text.starts_with("Error decompressing: size limit") => Some(
            Status::resource_exhausted(format!("grpc: received message after decompression larger than max {limit}")),
        ),
        (Code::Internal, text) if text.starts_with("Error decompressing: ") => Some(Status::internal(
            text.replace("Error decompressing", "grpc: failed to decompress the received message"),
        )),
        (Code::Internal, text) if text.contains("message with compressed-flag but no grpc-encoding") => {
            Some(Status::internal("grpc: compressed flag set with identity or empty encoding"))
        }
        (Code::Internal, text) if text.contains("failed to decode Protobuf message") => {
            let why = match text.contains("invalid string value") {
                true => "string field contains invalid UTF-8",
                false => "proto: cannot parse invalid wire-format data",
            };
            Some(Status::internal(format!("{bad_message}: {why}")))
        }
        _ => None,
    }
}

/// Why a stream of requests cannot be read on.
pub fn of_stream(found: Status, max_request_bytes: usize) -> Status {
    let limit = receive_max(max_request_bytes);
    of_transport(&found, BAD_STREAM_MESSAGE, limit).unwrap_or(found)
}

/// How etcd's gRPC library begins what it says of a message of a stream that it cannot read.
pub const BAD_STREAM_MESSAGE: &str = "grpc: failed to unmarshal the received message";

/// A call whose client ended it without a request.
pub fn no_message(is_stream: bool) -> Status {
    if is_stream {
        Status::internal("cardinality violation: received no request message from non-client-streaming RPC")
    } else {
        Status::unknown("EOF")
    }
}

/// A call that takes one request and answers with a stream.
pub fn many_messages() -> Status {
    Status::internal("cardinality violation: received multiple request messages for non-client-streaming RPC")
}

/// The largest message taken: beyond the largest request there is room for its envelope (G-11).
pub fn receive_max(max_request_bytes: usize) -> usize {
    max_request_bytes + (512 << 10)
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:ident $text:literal;)*) => {
        $($(#[$doc])* pub fn $name() -> Status { etcd(Code::$code, $text) })*
    };
}

// Refusals that need no look at the state, and those of this member's role.
statuses! {
    empty_key = InvalidArgument "key is not provided";
    key_not_found = InvalidArgument "key not found";
    value_provided = InvalidArgument "value is provided";
    lease_provided = InvalidArgument "lease is provided";
    too_many_ops = InvalidArgument "too many operations in txn request";
    duplicate_key = InvalidArgument "duplicate key given in txn request";
    bad_sort = InvalidArgument "invalid sort option";
    bad_api_version = InvalidArgument "invalid client api version";
    watch_canceled = Cancelled "watch canceled";
    no_leader = Unavailable "no leader";
    not_leader = FailedPrecondition "not leader";
    bad_member_urls = InvalidArgument "given member URLs are invalid";
    bad_downgrade_format = InvalidArgument "wrong downgrade target version format";
    bad_downgrade_target = InvalidArgument "invalid downgrade target version";
    no_cluster_version = FailedPrecondition "cluster version not found during downgrade";
    downgrade_in_process = FailedPrecondition "cluster has a downgrade job in progress";
    unknown_method = Unknown "unknown method";
    bad_transferee = FailedPrecondition "bad leader transferee";
    not_capable = FailedPrecondition "not capable";
    learner_unsupported = FailedPrecondition "rpc not supported for learner";
    auth_not_enabled = FailedPrecondition "authentication is not enabled";
}

/// A call this server does not have yet.
pub fn not_implemented(what: &'static str) -> Status {
    Error::NotImplemented(what).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_are_in_no_table_of_etcd_s_leave_as_unknown() {
        // G-2, M-40
        let shown = |e: Error| {
            let status = Status::from(e);
            (status.code(), status.message().to_owned())
        };
        assert_eq!(shown(Error::ProposalDropped), (Code::Unknown, "raft proposal dropped".to_owned()));
        assert_eq!(shown(Error::TooManyRequests), (Code::Unknown, "etcdserver: too many requests".to_owned()));
        assert_eq!(shown(Error::NotPrimaryLessor), (Code::Unknown, "not a primary lessor".to_owned()));
    }
}
