// npm's `etcd3` against the server whose address is the first argument: keys, transactions, watches, leases, locks.
import assert from "node:assert/strict";
import { Etcd3, EtcdLeaseInvalidError } from "etcd3";

const client = new Etcd3({ hosts: process.argv[2] });

// Keys
await client.put("n/a").value("1");
await client.put("n/b").value("2");
assert.equal(await client.get("n/a").string(), "1");
assert.equal(await client.get("n/none").string(), null);
assert.deepEqual(await client.getAll().prefix("n/").strings(), { "n/a": "1", "n/b": "2" });
assert.deepEqual(await client.getAll().prefix("n/").sort("Key", "Descend").limit(1).keys(), ["n/b"]);
assert.equal(await client.getAll().prefix("n/").count(), 2);
assert.equal((await client.delete().key("n/b")).deleted, "1");

// Transactions
const taken = await client.if("n/a", "Value", "==", "1").then(client.put("n/a").value("3")).else(client.get("n/a")).commit();
assert.equal(taken.succeeded, true);
const refused = await client.if("n/a", "Version", "==", 7).then(client.put("n/a").value("4")).else(client.get("n/a")).commit();
assert.equal(refused.succeeded, false);
assert.equal(refused.responses[0].response_range.kvs[0].value.toString(), "3");

// Watches
const watcher = await client.watch().prefix("w/").withPreviousKV().create();
const events = [];
const three = new Promise((resolve) => {
  const note = (kind) => (kv, prev) => {
    events.push([kind, kv.key.toString(), kv.value.toString(), prev?.value.toString()]);
    if (events.length === 3) resolve();
  };
  watcher.on("put", note("put"));
  watcher.on("delete", note("delete"));
});
await client.put("w/x").value("1");
await client.put("w/x").value("2");
await client.delete().key("w/x");
await three;
assert.deepEqual(events, [
  ["put", "w/x", "1", undefined],
  ["put", "w/x", "2", "1"],
  ["delete", "w/x", "", "2"],
]);
await watcher.cancel();

// Leases
const lease = client.lease(30);
await lease.put("l/k").value("v");
const id = await lease.grant();
assert.equal((await lease.keepaliveOnce()).TTL, "30");
assert.equal(await client.get("l/k").string(), "v");
assert.ok((await client.leaseClient.leaseTimeToLive({ ID: id, keys: true })).keys.some((key) => key.toString() === "l/k"));
await lease.revoke();
assert.equal(await client.get("l/k").string(), null);
await assert.rejects(async () => client.put("l/k").value("v").lease(id), EtcdLeaseInvalidError);

// A lock of the client's own making, from transactions and leases
const order = [];
await Promise.all(
  [1, 2].map((n) =>
    client.lock("lock").do(async () => {
      order.push(n);
    }).catch(() => order.push("busy")),
  ),
);
assert.equal(order.length, 2);

// Maintenance
const status = await client.maintenance.status();
assert.match(status.version, /^\d+\.\d+\.\d+/);
client.close();
// All its connections end. What else of the client now and then keeps the process is its own affair.
const deadline = Date.now() + 10_000;
while (process.getActiveResourcesInfo().includes("TCPSocketWrap")) {
  assert.ok(Date.now() < deadline, "a connection stays open");
  await new Promise((resolve) => setTimeout(resolve, 10));
}
console.log("all well");
process.exit(0);
