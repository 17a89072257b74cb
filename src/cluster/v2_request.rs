//! Requests as members below 3.6 write them into the log: only two of them concern members and version, and only those
//! are understood.

use prost::Message;
use serde::Deserialize;

use super::json;
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

#[derive(Deserialize)]
struct AttributesJson {
    #[serde(default)]
    name: String,
    #[serde(rename = "clientURLs", default, deserialize_with = "json::empty_if_null")]
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
    fn data_of_v2_clients_ends_the_process() {
        let refused = |method, path| read(&request(method, path, "x"));
        assert!(matches!(refused("PUT", "/1/a"), Err(Error::Foreign { .. })));
        assert!(matches!(refused("DELETE", "/0/version"), Err(Error::Foreign { .. })));
        assert_eq!(refused("PUT", "a"), Err(Error::Unknown));
        assert_eq!(refused("MOVE", "/0/version"), Err(Error::Unknown));
        assert_eq!(read(b"\xff"), Err(Error::Unknown));
    }
}
