//! What a membership change carries in its log entry: a `ConfChange` whose context is JSON.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Member, json, members::MemberJson};
use crate::pb::raftpb::{ConfChange, ConfChangeType};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A voter, or a learner if the member says so.
    Add(Member),
    /// A learner becomes a voter.
    Promote(u64),
    /// Only the peer URLs.
    Update {
        id: u64,
        peer_urls: Vec<String>,
    },
    Remove(u64),
}

/// A committed change that this binary cannot apply: the process must end, never skip it.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("membership change of unknown type {0}")]
    UnknownType(i32),
    #[error("membership change of node {node_id:x} with a context that cannot be read: {reason}")]
    Context { node_id: u64, reason: String },
    #[error("membership change of node {node_id:x} with the context of member {id:x}")]
    OtherMember { node_id: u64, id: u64 },
}

#[derive(Serialize, Deserialize)]
struct Context {
    #[serde(flatten)]
    member: MemberJson,
    #[serde(rename = "isPromote", default, skip_serializing_if = "std::ops::Not::not")]
    is_promote: bool,
}

impl Change {
    pub fn member_id(&self) -> u64 {
        match self {
            Change::Add(member) => member.id,
            Change::Promote(id) | Change::Update { id, .. } | Change::Remove(id) => *id,
        }
    }

    /// For a proposal with this request id; 0: none, as in the first entries of a cluster.
    pub fn encode(&self, request_id: u64) -> ConfChange {
        let member = match self {
            Change::Add(member) => Some(member.clone()),
            Change::Promote(id) => Some(Member { id: *id, ..Member::default() }),
            Change::Update { id, peer_urls } => {
                Some(Member { id: *id, peer_urls: peer_urls.clone(), ..Member::default() })
            }
            Change::Remove(_) => None,
        };
        let change_type = match self {
            Change::Add(member) if member.is_learner => ConfChangeType::ConfChangeAddLearnerNode,
            Change::Add(_) | Change::Promote(_) => ConfChangeType::ConfChangeAddNode,
            Change::Update { .. } => ConfChangeType::ConfChangeUpdateNode,
            Change::Remove(_) => ConfChangeType::ConfChangeRemoveNode,
        };
        let is_promote = matches!(self, Change::Promote(_));
        let context = member.map(|member| json::to_vec(&Context { member: member.into(), is_promote }));
        ConfChange {
            id: (request_id != 0).then_some(request_id),
            r#type: Some(change_type.into()),
            node_id: Some(self.member_id()),
            context: context.map(Bytes::from),
        }
    }

    pub fn decode(change: &ConfChange) -> Result<Self, DecodeError> {
        let node_id = change.node_id.unwrap_or(0);
        let change_type = ConfChangeType::try_from(change.r#type.unwrap_or(0))
            .map_err(|_| DecodeError::UnknownType(change.r#type.unwrap_or(0)))?;
        if change_type == ConfChangeType::ConfChangeRemoveNode {
            return Ok(Change::Remove(node_id));
        }
        let unreadable = |reason: String| DecodeError::Context { node_id, reason };
        let context: Context = serde_json::from_slice(change.context.as_deref().unwrap_or_default())
            .map_err(|error| unreadable(error.to_string()))?;
        let member = Member::from(context.member);
        if member.id != node_id {
            return Err(DecodeError::OtherMember { node_id, id: member.id });
        }
        match change_type {
            ConfChangeType::ConfChangeUpdateNode => Ok(Change::Update { id: node_id, peer_urls: member.peer_urls }),
            ConfChangeType::ConfChangeAddNode if context.is_promote => Ok(Change::Promote(node_id)),
            // raft goes by the type, the members rows by the context: they must never part ways.
            _ if member.is_learner != (change_type == ConfChangeType::ConfChangeAddLearnerNode) => {
                Err(unreadable("its type and isLearner disagree".to_owned()))
            }
            _ => Ok(Change::Add(member)),
        }
    }
}
