//! Computed ids. Every founding member computes the same ones by itself.

use sha1::{Digest, Sha1};

/// The id of a member of a new cluster.
pub fn member_id_for_bootstrap(peer_urls: &[String], token: &str) -> u64 {
    member_id(peer_urls, token)
}

/// The id of a member added at this time, so that the same URLs get a new id each time.
pub fn member_id_for_add(peer_urls: &[String], unix_secs: u64) -> u64 {
    member_id(peer_urls, &unix_secs.to_string())
}

/// The id of a cluster that begins with these members.
pub fn cluster_id(member_ids: &[u64]) -> u64 {
    let mut ids = member_ids.to_vec();
    ids.sort_unstable();
    let mut sha = Sha1::new();
    for id in ids {
        sha.update(id.to_be_bytes());
    }
    first_word(sha)
}

/// An id as text: hexadecimal without leading zeros.
pub fn hex(id: u64) -> String {
    format!("{id:x}")
}

fn member_id(peer_urls: &[String], suffix: &str) -> u64 {
    let mut urls: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    urls.sort_unstable();
    let mut sha = Sha1::new();
    for url in urls {
        sha.update(url.as_bytes());
    }
    sha.update(suffix.as_bytes());
    first_word(sha)
}

fn first_word(sha: Sha1) -> u64 {
    let digest = sha.finalize();
    u64::from_be_bytes(digest[..8].try_into().expect("SHA-1 has 20 bytes"))
}

/// Numbers proposals and read rounds, so that those of different members, and of one member before and after a
/// restart, differ: 16 bits of the member id, then a counter that begins at the time of the start.
#[derive(Debug)]
pub struct RequestIds {
    prefix: u64,
    counter: u64,
}

impl RequestIds {
    const COUNTER_MASK: u64 = (1 << 48) - 1;

    pub fn new(member_id: u64, unix_ms: u64) -> Self {
        Self { prefix: member_id << 48, counter: (unix_ms << 8) & Self::COUNTER_MASK }
    }

    pub fn next_id(&mut self) -> u64 {
        self.counter = (self.counter + 1) & Self::COUNTER_MASK;
        self.prefix | self.counter
    }

    /// A positive id for a lease whose client leaves the choice to the server.
    pub fn next_lease_id(&mut self) -> i64 {
        loop {
            let id = self.next_id() & !(1 << 63);
            if id != 0 {
                return id.cast_signed();
            }
        }
    }
}
