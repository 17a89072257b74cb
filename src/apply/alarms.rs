//! Alarms: replicated state of (member, kind) pairs that restrict what the cluster accepts.

use std::{collections::BTreeSet, sync::Arc};

use prost::Message;

use crate::{
    pb::etcdserverpb::{AlarmMember, AlarmType},
    storage::{Bucket, Error, Storage, WriteBatch},
};

/// Cheap to clone for views; there are few alarms and they change rarely.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alarms(Arc<BTreeSet<(u64, i32)>>);

fn row_key(member: u64, kind: i32) -> Vec<u8> {
    AlarmMember { member_id: member, alarm: kind }.encode_to_vec()
}

impl Alarms {
    pub fn load(storage: &dyn Storage) -> Result<Self, Error> {
        let mut alarms = BTreeSet::new();
        storage.scan(Bucket::Alarm, &[], &[], &mut |key, _| {
            if let Ok(member) = AlarmMember::decode(key) {
                alarms.insert((member.member_id, member.alarm));
            }
            true
        })?;
        Ok(Self(Arc::new(alarms)))
    }

    /// Stores the alarm; what is stored is returned either way (M-7).
    pub fn activate(&mut self, member: u64, kind: i32, batch: &mut WriteBatch) -> Vec<AlarmMember> {
        if kind == AlarmType::None as i32 {
            return Vec::new();
        }
        if Arc::make_mut(&mut self.0).insert((member, kind)) {
            batch.put(Bucket::Alarm, row_key(member, kind), Vec::new());
        }
        vec![AlarmMember { member_id: member, alarm: kind }]
    }

    /// Removes exactly this alarm; nothing if there is none (M-8).
    pub fn deactivate(&mut self, member: u64, kind: i32, batch: &mut WriteBatch) -> Vec<AlarmMember> {
        if !Arc::make_mut(&mut self.0).remove(&(member, kind)) {
            return Vec::new();
        }
        batch.delete(Bucket::Alarm, row_key(member, kind));
        vec![AlarmMember { member_id: member, alarm: kind }]
    }

    /// All alarms of a kind; of every kind for NONE (M-6).
    pub fn list(&self, kind: i32) -> Vec<AlarmMember> {
        self.0
            .iter()
            .filter(|(_, k)| kind == AlarmType::None as i32 || *k == kind)
            .map(|&(member_id, alarm)| AlarmMember { member_id, alarm })
            .collect()
    }

    pub fn is_active(&self, kind: AlarmType) -> bool {
        self.0.iter().any(|(_, k)| *k == kind as i32)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
