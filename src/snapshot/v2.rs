//! The membership as the tree that members below 3.7 read from a snapshot message, in JSON.
//!
//! They end at a tree they cannot read, and 3.5 and older take the members from it. Newer ones do not look.

use serde_json::{Map, Value, json};

use crate::cluster::{Member, Members, ids};

/// Slots of the event list, which older members use as a ring of that size.
const EVENTS: usize = 1000;

/// The tree of these members.
pub fn tree(members: &Members) -> Vec<u8> {
    let listed = members.iter().map(|member| (ids::hex(member.id), member_dir(member))).collect();
    let removed = members.removed().map(|id| {
        let path = format!("/0/removed_members/{}", ids::hex(id));
        (ids::hex(id), leaf(&path, ""))
    });
    let mut zero = Map::new();
    zero.insert("members".to_owned(), dir("/0/members", listed));
    zero.insert("removed_members".to_owned(), dir("/0/removed_members", removed.collect()));
    if let Some(version) = members.cluster_version() {
        zero.insert("version".to_owned(), leaf("/0/version", &version.to_string()));
    }
    let top = Map::from_iter([("0".to_owned(), dir("/0", zero)), ("1".to_owned(), dir("/1", Map::new()))]);
    let tree = json!({
        "Root": dir("/", top),
        "WatcherHub": {"EventHistory": {
            "Queue": {"Events": vec![Value::Null; EVENTS], "Size": 0, "Front": 0, "Back": 0, "Capacity": EVENTS},
            "StartIndex": 0,
            "LastIndex": 0,
        }},
        "CurrentIndex": 0,
        "Stats": stats(),
        "CurrentVersion": 2,
    });
    tree.to_string().into_bytes()
}

fn member_dir(member: &Member) -> Value {
    let path = format!("/0/members/{}", ids::hex(member.id));
    let mut raft = json!({"peerURLs": member.peer_urls});
    if member.is_learner {
        raft["isLearner"] = Value::Bool(true);
    }
    let mut children = Map::new();
    if member.is_started() {
        let attributes = json!({"name": member.name, "clientURLs": member.client_urls});
        children.insert("attributes".to_owned(), leaf(&format!("{path}/attributes"), &attributes.to_string()));
    }
    children.insert("raftAttributes".to_owned(), leaf(&format!("{path}/raftAttributes"), &raft.to_string()));
    dir(&path, children)
}

fn dir(path: &str, children: Map<String, Value>) -> Value {
    node(path, "", Value::Object(children))
}

fn leaf(path: &str, value: &str) -> Value {
    node(path, value, Value::Null)
}

fn node(path: &str, value: &str, children: Value) -> Value {
    json!({
        "Path": path,
        "CreatedIndex": 0,
        "ModifiedIndex": 0,
        "ExpireTime": "0001-01-01T00:00:00Z",
        "Value": value,
        "Children": children,
    })
}

fn stats() -> Value {
    let counted = ["gets", "sets", "delete", "update", "create", "compareAndSwap", "compareAndDelete"];
    let outcomes = counted.iter().flat_map(|name| [format!("{name}Success"), format!("{name}Fail")]);
    let others = ["expireCount", "watchers"].map(str::to_owned);
    Value::Object(outcomes.chain(others).map(|name| (name, Value::from(0))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::Change, storage::WriteBatch};

    #[test]
    fn members_stand_where_older_members_look_for_them() {
        let mut members = Members::default();
        let mut batch = WriteBatch::default();
        let add = |id, is_learner, name: &str| {
            let peer_urls = vec![format!("http://h:{id}")];
            Change::Add(Member { id, peer_urls, is_learner, name: name.to_owned(), ..Member::default() })
        };
        for change in [add(0xa1, false, "one"), add(0xa2, true, ""), add(0xa3, false, "gone"), Change::Remove(0xa3)] {
            members.apply(change, 1, &mut batch).unwrap();
        }
        let tree: Value = serde_json::from_slice(&tree(&members)).unwrap();
        let zero = &tree["Root"]["Children"]["0"]["Children"];
        let of = |id: &str, leaf: &str| zero["members"]["Children"][id]["Children"][leaf]["Value"].clone();
        assert_eq!(of("a1", "raftAttributes"), r#"{"peerURLs":["http://h:161"]}"#);
        assert_eq!(of("a1", "attributes"), r#"{"clientURLs":[],"name":"one"}"#);
        assert_eq!(of("a2", "raftAttributes"), r#"{"isLearner":true,"peerURLs":["http://h:162"]}"#);
        assert_eq!(of("a2", "attributes"), Value::Null, "not started");
        assert_eq!(zero["removed_members"]["Children"]["a3"]["Value"], "");
        assert_eq!(tree["WatcherHub"]["EventHistory"]["Queue"]["Events"].as_array().unwrap().len(), EVENTS);
        assert_eq!(tree["Stats"].as_object().unwrap().len(), 16);
    }
}
