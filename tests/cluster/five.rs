//! Clusters of five: they go on without any two of their members.

use std::time::Duration;

use crate::{RESUME, SHORT_LOG, STEP, WRITERS, calm, load::Load, members::Cluster, roll, rounds, run};

#[test]
fn two_of_five_killed_at_once_lose_nothing() {
    run(|| async {
        let mut cluster = Cluster::start(5, &SHORT_LOG).await;
        let load = Load::start(&cluster, WRITERS, 15);
        let mut longest = Duration::ZERO;
        for round in 0..rounds(2) {
            let leader = calm(&cluster, &load, STEP).await;
            let term = cluster.term().await;
            // The leader and another, or two others.
            let first = if round % 2 == 0 { leader } else { (leader + 1) % 5 };
            let two = [first, (first + 1 + round % 3) % 5]
                .map(|i| if round % 2 == 1 && i == leader { (i + 1) % 5 } else { i });
            load.reset_gap();
            for i in two {
                cluster.members[i].kill();
            }
            load.progress(2 * STEP).await;
            longest = longest.max(load.longest_gap());
            if !two.contains(&leader) {
                assert_eq!(cluster.term().await, term, "no election without a fault of the leader");
            }
            for i in two {
                cluster.restart(i);
            }
        }
        println!("longest pause of writes after two of five were killed: {longest:?}");
        assert!(longest < RESUME, "writes paused for {longest:?}");
        calm(&cluster, &load, STEP).await;
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn five_split_into_two_and_three_come_together() {
    run(|| async {
        let cluster = Cluster::start(5, &SHORT_LOG).await;
        let ids = cluster.ids();
        let load = Load::start(&cluster, WRITERS, 16);
        for round in 0..rounds(2) {
            let leader = calm(&cluster, &load, STEP).await;
            let term = cluster.term().await;
            // With the leader among the three, or among the two.
            let first = if round % 2 == 0 { leader + 1 } else { leader };
            let (two, three): (Vec<_>, Vec<_>) = (0..5).partition(|i| [first % 5, (first + 1) % 5].contains(i));
            let of = |side: &[usize]| side.iter().map(|i| ids[*i]).collect::<Vec<_>>();
            cluster.network.split(&of(&two), &of(&three));
            load.progress(2 * STEP).await;
            // Longer than an election takes.
            tokio::time::sleep(Duration::from_secs(3)).await;
            cluster.network.heal();
            if round % 2 == 0 {
                assert_eq!(cluster.until_agreed().await, (leader, term), "two of five unseat nobody");
            }
        }
        calm(&cluster, &load, STEP).await;
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn rolling_restart_of_five_hands_leadership_over() {
    // C-44
    run(|| roll(5, 17));
}
