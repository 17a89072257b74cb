//! Whether a change of the voters is safe enough to be tried: the rules of `--strict-reconfig-check`. They look at who has
//! started and who is connected, which members may see differently; so only the member that is asked checks them.

use super::{Member, Members};

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsafe {
    #[error("re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("unhealthy cluster")]
    Unhealthy,
}

/// The voters as the asked member sees them.
pub struct Voters<'a> {
    pub members: &'a Members,
    pub own_id: u64,
    /// Whether a member has been connected for long enough.
    pub is_healthy: &'a dyn Fn(u64) -> bool,
    /// Whether a member is connected at all.
    pub is_connected: &'a dyn Fn(u64) -> bool,
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

impl Voters<'_> {
    fn iter(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.is_learner)
    }

    fn count(&self) -> usize {
        self.iter().count()
    }

    fn started_without(&self, id: u64) -> usize {
        self.iter().filter(|member| member.id != id && member.is_started()).count()
    }

    /// This member counts itself.
    fn healthy(&self) -> usize {
        self.iter().filter(|member| member.id == self.own_id || (self.is_healthy)(member.id)).count()
    }

    pub fn may_add(&self, is_learner: bool) -> Result<(), Unsafe> {
        let (voters, started) = (self.count(), self.started_without(0));
        let second = voters == 1 && started == 1;
        if !is_learner && !second && started < quorum(voters + 1) {
            return Err(Unsafe::NotEnoughStarted);
        }
        if voters > 1 && self.healthy() < quorum(voters + 1) {
            return Err(Unsafe::Unhealthy);
        }
        Ok(())
    }

    pub fn may_remove(&self, id: u64) -> Result<(), Unsafe> {
        if self.members.get(id).is_some_and(|member| member.is_learner) {
            return Ok(());
        }
        let left = self.iter().filter(|member| member.id != id).count();
        if self.started_without(id) < quorum(left) {
            return Err(Unsafe::NotEnoughStarted);
        }
        // One that is not connected takes nothing away.
        if (self.is_connected)(id) && self.healthy() < 1 + quorum(self.count() - 1) {
            return Err(Unsafe::Unhealthy);
        }
        Ok(())
    }

    pub fn may_promote(&self) -> Result<(), Unsafe> {
        // The learner has started: it has followed the log.
        if self.started_without(0) + 1 < quorum(self.count() + 1) {
            return Err(Unsafe::NotEnoughStarted);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::Change, storage::WriteBatch};

    /// Voters 1 to `started` have started, up to `n` have not; a learner if wanted.
    fn members(n: u64, started: u64, learner: Option<u64>) -> Members {
        let mut members = Members::default();
        let mut batch = WriteBatch::default();
        for id in (1..=n).chain(learner) {
            let name = if id <= started { id.to_string() } else { String::new() };
            let peer_urls = vec![format!("http://h:{id}")];
            let is_learner = Some(id) == learner;
            let member = Member { id, peer_urls, name, is_learner, ..Member::default() };
            members.apply(Change::Add(member), 1, &mut batch).unwrap();
        }
        members
    }

    /// Of the others, those up to `connected` are connected and healthy.
    fn judge<T>(members: &Members, connected: u64, check: impl Fn(&Voters) -> T) -> T {
        let up = |id| id != 1 && id <= connected;
        check(&Voters { members, own_id: 1, is_healthy: &up, is_connected: &up })
    }

    #[test]
    fn voters_are_added_only_where_enough_have_started() {
        // C-9, limits 16
        let add = |n, started| judge(&members(n, started, None), n, |v| v.may_add(false));
        assert_eq!(add(1, 1), Ok(()), "the second");
        assert_eq!(add(3, 3), Ok(()));
        assert_eq!(add(3, 2), Err(Unsafe::NotEnoughStarted));
        assert_eq!(add(2, 1), Err(Unsafe::NotEnoughStarted));
        assert_eq!(add(4, 3), Ok(()));
        let learner = |n, started| judge(&members(n, started, None), n, |v| v.may_add(true));
        assert_eq!(learner(3, 2), Ok(()), "C-11");
    }

    #[test]
    fn members_are_added_only_where_enough_are_connected() {
        // C-10, C-11
        for is_learner in [false, true] {
            let add = |n, connected| judge(&members(n, n, None), connected, |v| v.may_add(is_learner));
            assert_eq!(add(3, 3), Ok(()));
            assert_eq!(add(3, 2), Err(Unsafe::Unhealthy));
            assert_eq!(add(1, 1), Ok(()));
            assert_eq!(add(5, 4), Ok(()));
            assert_eq!(add(5, 3), Err(Unsafe::Unhealthy));
        }
    }

    #[test]
    fn removal_leaves_a_working_rest() {
        // C-15
        let remove = |n, started, connected, id| judge(&members(n, started, Some(9)), connected, |v| v.may_remove(id));
        assert_eq!(remove(1, 1, 1, 1), Err(Unsafe::NotEnoughStarted), "the only voter");
        assert_eq!(remove(3, 3, 3, 2), Ok(()));
        assert_eq!(remove(3, 2, 2, 2), Err(Unsafe::NotEnoughStarted));
        assert_eq!(remove(3, 2, 2, 3), Ok(()), "one that never started");
        assert_eq!(remove(3, 3, 2, 3), Ok(()), "one that is down");
        assert_eq!(remove(3, 3, 2, 2), Err(Unsafe::Unhealthy));
        assert_eq!(remove(3, 3, 3, 1), Ok(()), "itself");
        assert_eq!(remove(3, 2, 1, 9), Ok(()), "a learner");
    }

    #[test]
    fn promotion_counts_the_learner_as_started() {
        // C-21
        let promote = |n, started| judge(&members(n, started, Some(9)), n, |v| v.may_promote());
        assert_eq!(promote(3, 3), Ok(()));
        assert_eq!(promote(1, 1), Ok(()));
        assert_eq!(promote(3, 1), Err(Unsafe::NotEnoughStarted));
    }
}
