//! Requests as members below 3.6 write them into the log: only two of them concern members and version, and only those
//! are understood. Members below 3.5 end at today's form of these two, so towards them they are written in the old one.

use prost::Message;
use serde::{Deserialize, Serialize};

use super::{Version, ids, json};
use crate::pb::{
    etcdserverpb::InternalRaftRequest,
    membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest},
};

#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, tag = "2")]
    method: String,
    #[prost(string, tag = "3")]
    path: String,
    #[prost(string, tag = "4")]
    value: String,
}

/// As it is written: nearly all fields, also where they say nothing.
#[derive(Clone, PartialEq, prost::Message)]
struct Whole {
    #[prost(uint64, required, tag = "1")]
    id: u64,
    #[prost(string, required, tag = "2")]
    method: String,
    #[prost(string, required, tag = "3")]
    path: String,
    #[prost(string, required, tag = "4")]
    value: String,
    #[prost(bool, required, tag = "5")]
    dir: bool,
    #[prost(string, required, tag = "6")]
    prev_value: String,
    #[prost(uint64, required, tag = "7")]
    prev_index: u64,
    #[prost(int64, required, tag = "9")]
    expiration: i64,
    #[prost(bool, required, tag = "10")]
    wait: bool,
    #[prost(uint64, required, tag = "11")]
    since: u64,
    #[prost(bool, required, tag = "12")]
    recursive: bool,
    #[prost(bool, required, tag = "13")]
    sorted: bool,
    #[prost(bool, required, tag = "14")]
    quorum: bool,
    #[prost(int64, required, tag = "15")]
    time: i64,
    #[prost(bool, required, tag = "16")]
    stream: bool,
}

#[derive(Serialize, Deserialize)]
struct AttributesJson {
    #[serde(default)]
    name: String,
    #[serde(
        rename = "clientURLs",
        default,
        deserialize_with = "json::empty_if_null",
        skip_serializing_if = "Vec::is_empty"
    )]
    client_urls: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("it is no request of any version")]
    Unknown,
    #[error("it is a v2 request that no member makes for itself: {method} {path}; v2 data is not kept")]
    Foreign { method: String, path: String },
    #[error("the v2 request for {path} has a value that cannot be read: {reason}")]
    Value { path: String, reason: String },
}

/// The first release that understands today's form.
pub const TODAY: Version = Version::new(3, 5, 0);

/// The old form of `request`, if it has one and the oldest member needs it. Members of 3.7 end at it.
pub fn write(request: &InternalRaftRequest, oldest: Version, id: u64) -> Option<Vec<u8>> {
    if oldest >= TODAY {
        return None;
    }
    let (path, value) = if let Some(set) = &request.cluster_version_set {
        ("/0/version".to_owned(), set.ver.clone())
    } else {
        let set = request.cluster_member_attr_set.as_ref()?;
        let attributes = set.member_attributes.clone().unwrap_or_default();
        let json = json::to_vec(&AttributesJson { name: attributes.name, client_urls: attributes.client_urls });
        (format!("/0/members/{}/attributes", ids::hex(set.member_id)), String::from_utf8(json).ok()?)
    };
    Some(Whole { id, method: "PUT".to_owned(), path, value, ..Whole::default() }.encode_to_vec())
}

/// The request of today that means the same.
pub fn read(data: &[u8]) -> Result<InternalRaftRequest, Error> {
    let Request { method, path, value } = Request::decode(data).map_err(|_| Error::Unknown)?;
    if !path.starts_with('/') || !["PUT", "POST", "DELETE", "QGET", "SYNC"].contains(&method.as_str()) {
        return Err(Error::Unknown);
    }
    if method != "PUT" {
        return Err(Error::Foreign { method, path });
    }
    if path == "/0/version" {
        let set = ClusterVersionSetRequest { ver: value };
        return Ok(InternalRaftRequest { cluster_version_set: Some(set), ..Default::default() });
    }
    let id = path.strip_prefix("/0/members/").and_then(|rest| rest.strip_suffix("/attributes"));
    let Some(member_id) = id.and_then(|id| u64::from_str_radix(id, 16).ok()) else {
        return Err(Error::Foreign { method, path });
    };
    let attributes: AttributesJson =
        serde_json::from_str(&value).map_err(|e| Error::Value { path, reason: e.to_string() })?;
    let attributes = Attributes { name: attributes.name, client_urls: attributes.client_urls };
    let set = ClusterMemberAttrSetRequest { member_id, member_attributes: Some(attributes) };
    Ok(InternalRaftRequest { cluster_member_attr_set: Some(set), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, path: &str, value: &str) -> Vec<u8> {
        Request { method: method.into(), path: path.into(), value: value.into() }.encode_to_vec()
    }

    #[test]
    fn publishing_and_version_are_understood() {
        let bytes =
            request("PUT", "/0/members/8e9e05c52164694d/attributes", r#"{"name":"s35","clientURLs":["http://h:1"]}"#);
        assert!(InternalRaftRequest::decode(bytes.as_slice()).is_err(), "so the two are told apart");
        let set = read(&bytes).unwrap().cluster_member_attr_set.unwrap();
        assert_eq!(set.member_id, 0x8e9e_05c5_2164_694d);
        assert_eq!(set.member_attributes.unwrap().client_urls, ["http://h:1"]);
        let version = read(&request("PUT", "/0/version", "3.5.0")).unwrap().cluster_version_set.unwrap();
        assert_eq!(version.ver, "3.5.0");
    }

    #[test]
    fn members_that_need_the_old_form_get_it() {
        let attributes = Attributes { name: "n".into(), client_urls: vec!["http://h:1".into()] };
        let set = ClusterMemberAttrSetRequest { member_id: 0xa1, member_attributes: Some(attributes) };
        let publish = InternalRaftRequest { cluster_member_attr_set: Some(set), ..Default::default() };
        let (old, new) = (Version::new(3, 4, 0), Version::new(3, 5, 0));
        assert_eq!(write(&publish, new, 7), None);
        let bytes = write(&publish, old, 7).unwrap();
        assert_eq!(read(&bytes), Ok(publish));
        // The first field is the id, by which the waiting caller is found; fields that say nothing are there, too.
        assert_eq!(bytes[..2], [0x08, 7]);
        assert!(bytes.ends_with(&[0x78, 0, 0x80, 1, 0]), "{bytes:02x?}");
        for ver in ["3.0.0", "3.4.0"] {
            let raise = InternalRaftRequest {
                cluster_version_set: Some(ClusterVersionSetRequest { ver: ver.into() }),
                ..Default::default()
            };
            assert_eq!(read(&write(&raise, old, 1).unwrap()), Ok(raise.clone()));
            assert_eq!(write(&raise, new, 1), None);
        }
        assert_eq!(write(&InternalRaftRequest::default(), old, 1), None, "other requests have one form");
    }

    #[test]
    fn data_of_v2_clients_ends_the_process() {
        let refused = |method, path| read(&request(method, path, "x"));
        assert!(matches!(refused("PUT", "/1/a"), Err(Error::Foreign { .. })));
        assert!(matches!(refused("DELETE", "/0/version"), Err(Error::Foreign { .. })));
        assert_eq!(refused("PUT", "a"), Err(Error::Unknown));
        assert_eq!(refused("MOVE", "/0/version"), Err(Error::Unknown));
        assert_eq!(read(b"\xff"), Err(Error::Unknown));
    }
}
