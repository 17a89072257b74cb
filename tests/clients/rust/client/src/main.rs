//! The crate `etcd-client` against the server whose address is the first argument.

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, EventType, GetOptions, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse, WatchOptions,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let endpoint = std::env::args().nth(1).expect("the server's address");
    let mut client = Client::connect([endpoint], None).await?;
    keys(&mut client).await?;
    transactions(&mut client).await?;
    watches(&mut client).await?;
    leases(&mut client).await?;
    maintenance(&mut client).await?;
    println!("all well");
    Ok(())
}

async fn keys(client: &mut Client) -> Result<(), Error> {
    for (key, value) in [("r/a", "1"), ("r/b", "2"), ("r/c", "3")] {
        client.put(key, value, None).await?;
    }
    let put = client.put("r/a", "4", Some(PutOptions::new().with_prev_key())).await?;
    assert_eq!(put.prev_key().expect("a former value").value(), b"1");
    let options = GetOptions::new().with_prefix().with_sort(SortTarget::Key, SortOrder::Descend).with_limit(2);
    let page = client.get("r/", Some(options)).await?;
    assert_eq!((page.count(), page.more()), (3, true));
    assert_eq!(page.kvs().iter().map(|kv| kv.key()).collect::<Vec<_>>(), [b"r/c", b"r/b"]);
    let gone = client.delete("r/", Some(DeleteOptions::new().with_prefix().with_prev_key())).await?;
    assert_eq!((gone.deleted(), gone.prev_kvs().len()), (3, 3));
    let refused = client.get("r/a", Some(GetOptions::new().with_revision(i64::MAX))).await;
    assert!(refused.unwrap_err().to_string().contains("required revision is a future revision"));
    Ok(())
}

async fn transactions(client: &mut Client) -> Result<(), Error> {
    let txn = Txn::new()
        .when([Compare::version("t/k", CompareOp::Equal, 0)])
        .and_then([TxnOp::put("t/k", "v", None), TxnOp::get("t/k", None)])
        .or_else([TxnOp::get("t/k", None)]);
    let first = client.txn(txn.clone()).await?;
    assert!(first.succeeded());
    assert_eq!(first.op_responses().len(), 2);
    let second = client.txn(txn).await?;
    assert!(!second.succeeded());
    match second.op_responses().as_slice() {
        [TxnOpResponse::Get(got)] => assert_eq!(got.kvs()[0].value(), b"v"),
        other => panic!("{other:?}"),
    }
    Ok(())
}

async fn watches(client: &mut Client) -> Result<(), Error> {
    let options = WatchOptions::new().with_prefix().with_prev_key();
    let mut stream = client.watch("w/", Some(options)).await?;
    client.put("w/x", "1", None).await?;
    client.put("w/x", "2", None).await?;
    client.delete("w/x", None).await?;
    let mut seen = Vec::new();
    let mut watch_id = 0;
    while seen.len() < 3 {
        let response = stream.message().await?.expect("the stream goes on");
        watch_id = response.watch_id();
        for event in response.events() {
            let kv = event.kv().expect("an event has a record");
            seen.push((event.event_type(), kv.value().to_vec(), event.prev_kv().map(|kv| kv.value().to_vec())));
        }
    }
    assert_eq!(seen[0], (EventType::Put, b"1".to_vec(), None));
    assert_eq!(seen[1], (EventType::Put, b"2".to_vec(), Some(b"1".to_vec())));
    assert_eq!(seen[2], (EventType::Delete, Vec::new(), Some(b"2".to_vec())));
    stream.cancel(watch_id).await?;
    loop {
        let response = stream.message().await?.expect("the stream goes on");
        if response.canceled() {
            return Ok(());
        }
    }
}

async fn leases(client: &mut Client) -> Result<(), Error> {
    let lease = client.lease_grant(60, None).await?.id();
    client.put("l/k", "v", Some(PutOptions::new().with_lease(lease))).await?;
    let (mut keeper, mut answers) = client.lease_keep_alive(lease).await?;
    keeper.keep_alive().await?;
    assert_eq!(answers.message().await?.expect("an answer").ttl(), 60);
    let options = etcd_client::LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(lease, Some(options)).await?;
    assert_eq!((left.granted_ttl(), left.keys()), (60, [b"l/k".to_vec()].as_slice()));
    assert!(client.leases().await?.leases().iter().any(|status| status.id() == lease));
    client.lease_revoke(lease).await?;
    assert_eq!(client.get("l/k", None).await?.count(), 0);
    let refused = client.put("l/k", "v", Some(PutOptions::new().with_lease(lease))).await;
    assert!(refused.unwrap_err().to_string().contains("requested lease not found"));
    Ok(())
}

async fn maintenance(client: &mut Client) -> Result<(), Error> {
    let revision = client.get("t/k", None).await?.header().expect("a header").revision();
    client.compact(revision, None).await?;
    let refused = client.get("t/k", Some(GetOptions::new().with_revision(1))).await;
    assert!(refused.unwrap_err().to_string().contains("required revision has been compacted"));
    assert_eq!(client.member_list().await?.members().len(), 1);
    assert!(!client.status().await?.version().is_empty());
    client.defragment().await?;
    Ok(())
}
