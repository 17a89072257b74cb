//! Finding the first members through another cluster: each registers under a token there, and the first so many that
//! did form the new cluster.
//!
//! Here: which keys there are, who is in, and when the list is complete. Asking and waiting are the shell's
//! (`server::discovery`).

use super::{
    bootstrap::{self, InitialCluster},
    ids,
};

const REGISTRY: &str = "/_etcd/registry";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("discovery: invalid peer URL")]
    InvalidUrl,
    #[error("discovery: size key is bad")]
    BadSize,
    #[error("discovery: size key not found")]
    NoSize,
    #[error("discovery: cluster is full")]
    Full,
}

/// Why a key below the members' prefix registers nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Skipped {
    #[error("invalid peer registry key")]
    Key,
    #[error("invalid peer info returned from discovery service")]
    Value,
    #[error("found duplicate peer from discovery service")]
    Duplicate,
}

/// Where things are in the discovery service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// How many members the cluster begins with; an operator writes it.
    pub size: String,
    /// What the keys of all members begin with.
    pub members: String,
    /// Of this member.
    pub own: String,
}

impl Keys {
    pub fn new(token: &str, member_id: u64) -> Self {
        let registry = joined(&[REGISTRY, token]);
        let members = joined(&[&registry, "members"]);
        let own = joined(&[&members, &ids::hex(member_id)]);
        Self { size: joined(&[&registry, "_config/size"]), members, own }
    }
}

/// One absolute path of these parts, without empty parts, `.` and `..`.
fn joined(parts: &[&str]) -> String {
    let mut path: Vec<&str> = Vec::new();
    for name in parts.iter().flat_map(|part| part.split('/')) {
        match name {
            "" | "." => {}
            ".." => drop(path.pop()),
            name => path.push(name),
        }
    }
    format!("/{}", path.join("/"))
}

/// The number of members in the size key.
pub fn size(value: Option<&[u8]>) -> Result<usize, Error> {
    let text = std::str::from_utf8(value.ok_or(Error::NoSize)?).map_err(|_| Error::BadSize)?;
    let size: i64 = text.parse().map_err(|_| Error::BadSize)?;
    usize::try_from(size).ok().filter(|size| *size > 0).ok_or(Error::BadSize)
}

/// Who has registered so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registrations {
    keys: Keys,
    size: usize,
    /// In the order in which they registered.
    members: Vec<Registration>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Registration {
    create_revision: i64,
    key: String,
    /// `name=url`, several with commas between them.
    value: String,
}

impl Registrations {
    pub fn new(keys: Keys, size: usize) -> Self {
        Self { keys, size, members: Vec::new() }
    }

    /// Takes note of a key of the service. Only the first value of a key counts, and a deletion (without a value) is
    /// none.
    pub fn add(&mut self, key: &[u8], value: &[u8], create_revision: i64) -> Result<(), Skipped> {
        let trimmed = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let (key, value) = (trimmed(key), trimmed(value));
        if !key.starts_with(&self.keys.members) {
            return Err(Skipped::Key);
        }
        if !value.contains('=') {
            return Err(Skipped::Value);
        }
        if self.members.iter().any(|member| member.key == key) {
            return Err(Skipped::Duplicate);
        }
        let registration = Registration { create_revision, key, value };
        let at = self.members.partition_point(|member| *member < registration);
        self.members.insert(at, registration);
        Ok(())
    }

    /// Whether this member is among the first so many, or can still be.
    pub fn check(&self) -> Result<(), Error> {
        let first = &self.members[..self.members.len().min(self.size)];
        let is_in = first.iter().any(|member| member.key == self.keys.own);
        if is_in || first.len() < self.size { Ok(()) } else { Err(Error::Full) }
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn found(&self) -> usize {
        self.members.len()
    }

    pub fn is_complete(&self) -> bool {
        self.members.len() >= self.size
    }

    /// The members that the cluster begins with; `parse_url` as in [`InitialCluster::parse`].
    pub fn initial_cluster(&self, parse_url: impl Fn(&str) -> Result<String, String>) -> Result<InitialCluster, Error> {
        let first: Vec<&str> = self.members.iter().take(self.size).map(|member| member.value.as_str()).collect();
        InitialCluster::parse(&first.join(","), parse_url).map_err(|_: bootstrap::Error| Error::InvalidUrl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "t";

    fn keys(id: u64) -> Keys {
        Keys::new(TOKEN, id)
    }

    fn key(id: u64) -> String {
        keys(id).own
    }

    fn registered(own: u64, size: usize, members: &[(u64, i64)]) -> Registrations {
        let mut registrations = Registrations::new(keys(own), size);
        for (id, revision) in members {
            let value = format!("m{id}=http://h:{id}");
            registrations.add(key(*id).as_bytes(), value.as_bytes(), *revision).unwrap();
        }
        registrations
    }

    fn cluster(registrations: &Registrations) -> String {
        registrations.initial_cluster(|url| Ok(url.to_owned())).unwrap().to_string()
    }

    #[test]
    fn keys_are_etcds() {
        // limits.md 17
        assert_eq!(
            keys(0x00ab_cdef),
            Keys {
                size: "/_etcd/registry/t/_config/size".into(),
                members: "/_etcd/registry/t/members".into(),
                own: "/_etcd/registry/t/members/abcdef".into(),
            }
        );
        assert_eq!(Keys::new("/a//b/./c/../", 1).own, "/_etcd/registry/a/b/members/1");
        assert_eq!(Keys::new("../../../..", 1).size, "/_config/size");
    }

    #[test]
    fn only_a_positive_number_is_a_size() {
        assert_eq!(size(None), Err(Error::NoSize));
        for good in ["3", "+3", "03"] {
            assert_eq!(size(Some(good.as_bytes())), Ok(3), "{good}");
        }
        for bad in ["", "0", "-1", "x", " 3", "3\n", "1_0", "9223372036854775808", "\u{663}"] {
            assert_eq!(size(Some(bad.as_bytes())), Err(Error::BadSize), "{bad}");
        }
        assert_eq!(size(Some(b"\xff")), Err(Error::BadSize));
    }

    #[test]
    fn the_first_so_many_by_create_revision_are_the_cluster() {
        // limits.md 17
        let four = [(1, 9), (2, 5), (3, 7), (4, 3)];
        for own in [2, 3, 4] {
            let registrations = registered(own, 3, &four);
            assert_eq!(registrations.check(), Ok(()), "{own}");
            assert!(registrations.is_complete());
            assert_eq!(cluster(&registrations), "m2=http://h:2,m3=http://h:3,m4=http://h:4");
        }
        assert_eq!(registered(1, 3, &four).check(), Err(Error::Full));
        assert_eq!(registered(5, 3, &four).check(), Err(Error::Full));
        // At one revision, everybody sees the same order all the same.
        assert_eq!(cluster(&registered(1, 2, &[(3, 5), (1, 5), (2, 5)])), "m1=http://h:1,m2=http://h:2");
    }

    #[test]
    fn there_is_room_until_the_last_place_is_taken() {
        assert_eq!(registered(3, 3, &[]).check(), Ok(()));
        assert_eq!(registered(3, 3, &[(1, 1), (2, 2)]).check(), Ok(()));
        assert!(!registered(3, 3, &[(1, 1), (2, 2)]).is_complete());
        assert_eq!(registered(4, 3, &[(1, 1), (2, 2), (3, 3)]).check(), Err(Error::Full));
        assert_eq!(registered(1, 1, &[(1, 1)]).check(), Ok(()));
    }

    #[test]
    fn who_registers_again_keeps_the_place_and_who_leaves_is_not_missed() {
        let mut registrations = registered(1, 2, &[(1, 4)]);
        let mut add = |key: &str, value: &str| registrations.add(key.as_bytes(), value.as_bytes(), 5);
        assert_eq!(add(&key(1), "m1=http://other:1"), Err(Skipped::Duplicate));
        assert_eq!(add(&key(1), ""), Err(Skipped::Value));
        assert_eq!(add(&key(2), "http://h:2"), Err(Skipped::Value));
        assert_eq!(add("/_etcd/registry/other/members/2", "m2=http://h:2"), Err(Skipped::Key));
        assert_eq!(add(&format!(" {} ", key(2)), "\tm2=http://h:2\n"), Ok(()));
        assert_eq!(cluster(&registrations), "m1=http://h:1,m2=http://h:2");
    }

    #[test]
    fn several_urls_of_a_member_are_one_place_and_bad_ones_an_error() {
        let mut registrations = Registrations::new(keys(1), 1);
        registrations.add(key(1).as_bytes(), b"a=http://h:1,a=http://h:2", 1).unwrap();
        assert_eq!(cluster(&registrations), "a=http://h:1,a=http://h:2");
        assert_eq!(registrations.initial_cluster(|_| Err("bad".into())), Err(Error::InvalidUrl));
    }
}
