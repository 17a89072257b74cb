//! Times of requests by their kind, from a table that is made once: recording is one look at the request and two additions.

use std::time::Duration;

use super::metrics::Histogram;
use crate::pb::etcdserverpb::InternalRaftRequest;

/// What a request is called where times are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Range,
    ReadonlyTxn,
    Put,
    DeleteRange,
    Txn,
    Compaction,
    LeaseGrant,
    LeaseRevoke,
    LeaseCheckpoint,
    Alarm,
    ClusterVersionSet,
    ClusterMemberAttrSet,
    DowngradeInfoSet,
    Unknown,
}

const KINDS: [Kind; 14] = [
    Kind::Range,
    Kind::ReadonlyTxn,
    Kind::Put,
    Kind::DeleteRange,
    Kind::Txn,
    Kind::Compaction,
    Kind::LeaseGrant,
    Kind::LeaseRevoke,
    Kind::LeaseCheckpoint,
    Kind::Alarm,
    Kind::ClusterVersionSet,
    Kind::ClusterMemberAttrSet,
    Kind::DowngradeInfoSet,
    Kind::Unknown,
];

impl Kind {
    pub fn of(request: &InternalRaftRequest) -> Self {
        // In the order of their use.
        if request.put.is_some() {
            Kind::Put
        } else if request.txn.is_some() {
            Kind::Txn
        } else if request.delete_range.is_some() {
            Kind::DeleteRange
        } else if request.lease_grant.is_some() {
            Kind::LeaseGrant
        } else if request.lease_revoke.is_some() {
            Kind::LeaseRevoke
        } else if request.lease_checkpoint.is_some() {
            Kind::LeaseCheckpoint
        } else if request.compaction.is_some() {
            Kind::Compaction
        } else if request.alarm.is_some() {
            Kind::Alarm
        } else if request.cluster_version_set.is_some() {
            Kind::ClusterVersionSet
        } else if request.cluster_member_attr_set.is_some() {
            Kind::ClusterMemberAttrSet
        } else if request.downgrade_info_set.is_some() {
            Kind::DowngradeInfoSet
        } else if request.range.is_some() {
            Kind::Range
        } else {
            Kind::Unknown
        }
    }
}

/// One histogram for each kind and result.
#[derive(Debug)]
pub struct Requests(Vec<[Histogram; 2]>);

impl Requests {
    pub fn new(bounds: &'static [f64]) -> Self {
        Self(KINDS.iter().map(|_| [Histogram::new(bounds), Histogram::new(bounds)]).collect())
    }

    pub fn record(&self, kind: Kind, success: bool, took: Duration) {
        self.0[kind as usize][usize::from(success)].record(took);
    }

    /// Kind, result and times of those that have any.
    pub fn iter(&self) -> impl Iterator<Item = (String, &'static str, &Histogram)> {
        KINDS
            .iter()
            .zip(&self.0)
            .flat_map(|(kind, [failed, done])| {
                [(format!("{kind:?}"), "false", failed), (format!("{kind:?}"), "true", done)]
            })
            .filter(|(_, _, times)| times.read().1 > 0)
    }
}
