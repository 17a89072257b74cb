//! Compiles `proto/` with protox: no `protoc` is needed on the machine.

use std::{env, fs, path::PathBuf};

use prost::Message;

const PROTOS: &[&str] = &[
    "authpb/auth.proto",
    "etcdserverpb/metadata.proto",
    "etcdserverpb/raft_internal.proto",
    "etcdserverpb/rpc.proto",
    "grpc/health.proto",
    "leasepb/lease.proto",
    "membershippb/membership.proto",
    "mvccpb/kv.proto",
    "raftpb/raft.proto",
    "snappb/snap.proto",
    "v3electionpb/v3election.proto",
    "v3lockpb/v3lock.proto",
    "versionpb/version.proto",
    "walpb/record.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        .build_client(true)
        .bytes(".")
        // Key-value records and events travel as the bytes they are stored as (see `mvcc::record`):
        // what apply encoded once is copied into every answer, never decoded on the way.
        .extern_path(".mvccpb.KeyValue", "crate::mvcc::record::RawKeyValue")
        .extern_path(".mvccpb.Event", "crate::mvcc::record::RawEvent")
        .compile_fds(descriptors)?;
    Ok(())
}
