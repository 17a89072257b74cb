//! The protobuf messages of `proto/`, one module per package. Wire names and numbers are etcd's.

/// The compiled descriptors of every file in `proto/`, for tests and tools.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! package {
    ($name:ident, $file:literal) => {
        #[allow(clippy::all, missing_docs)]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $file, ".rs"));
        }
    };
}

package!(authpb, "authpb");
package!(etcdserverpb, "etcdserverpb");
package!(health, "grpc.health.v1");
package!(leasepb, "leasepb");
package!(membershippb, "membershippb");
package!(raftpb, "raftpb");
package!(snappb, "snappb");
package!(v3electionpb, "v3electionpb");
package!(v3lockpb, "v3lockpb");
package!(walpb, "walpb");
