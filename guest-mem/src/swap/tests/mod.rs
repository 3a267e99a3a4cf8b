//! The store as a whole, on failing disks; [`model`] holds it against a map.

mod manager;
mod model;
mod rig;

use super::cluster::ClusterState;
use super::extents::BLOCK;
use super::store::Limits;
use super::*;
use crate::addr::PAGE_SIZE;
use rig::*;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[test]
fn the_threads_end_with_the_store() {
    let disk = Disk::new(1000);
    disk.hold_writes();
    let mut swap = store(&disk, tiny());
    for seed in 0..4 {
        swap.put(&cluster(seed)).unwrap();
    }
    disk.let_writes_go();
    drop(swap);
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn a_flipped_bit_loses_its_cluster_alone() {
    let scratch = Scratch::new("flip");
    let mut swap = scratch.open(Some(4 << 20)).unwrap();
    let slots = on_disk(&mut swap, 6);
    let place = swap.books[2].state.place().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&scratch.0).unwrap();
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, (place.start + 3) * BLOCK as u64).unwrap();
    block[77] ^= 4;
    file.write_all_at(&block, (place.start + 3) * BLOCK as u64).unwrap();

    for (seed, &first) in slots.iter().enumerate() {
        if seed == 2 {
            let error = fetch(&mut swap, first.nth(1), 2).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            let again = fetch(&mut swap, first, 1).unwrap_err();
            assert_eq!(again.to_string(), error.to_string());
        } else {
            assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
        }
    }
    slots.iter().for_each(|&first| swap.free(first, CLUSTER));
    assert_eq!(swap.stats().disk_bytes, 0);
}

#[test]
fn data_in_the_wrong_place_is_noticed() {
    let disk = Disk::new(200);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 2);
    let places = [0, 1].map(|key| swap.books[key].state.place().unwrap());
    let from = places[0].start as usize * BLOCK;
    disk.bytes.lock().unwrap().copy_within(from..from + places[0].bytes(), places[1].start as usize * BLOCK);
    assert!(fetch(&mut swap, slots[1], 16).unwrap_err().to_string().contains("another cluster"));
    assert!(fetch(&mut swap, slots[0], 16).unwrap() == cluster(0));
}

#[test]
fn a_full_disk_refuses_and_keeps() {
    let disk = Disk::new(5 * 17);
    let mut swap = store(&disk, tiny());
    let mut slots = Vec::new();
    let error = loop {
        match swap.put(&cluster(slots.len() as u64)) {
            Ok(first) => slots.push(first),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                next(&mut swap);
            }
            Err(error) => break error,
        }
        assert_sound(&swap);
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(slots.len(), 9, "five on the disk and four in memory");
    assert_eq!(swap.capacity().disk_free, 0);
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    // Zeros always fit, and a free makes room.
    let zeros = swap.put(&[0; 2 * PAGE_SIZE]).unwrap();
    assert_eq!(fetch(&mut swap, zeros, 2).unwrap(), [0; 2 * PAGE_SIZE]);
    swap.free(slots[0], CLUSTER);
    let late = put(&mut swap, &cluster(99));
    assert!(fetch(&mut swap, late, 16).unwrap() == cluster(99));
}

/// What nobody needs is discarded when it is much and the disk has nothing else to do, and no more than that.
#[test]
fn stale_blocks_are_discarded() {
    let disk = Disk::new(600);
    let mut swap = store(&disk, tiny());
    let slots: Vec<SwapSlot> = (0..12).map(|seed| put(&mut swap, &cluster(seed))).collect();
    write_back(&mut swap);
    let placed: Vec<bool> = slots.iter().map(|slot| swap.books[slot.0 as usize / 16].state.place().is_some()).collect();
    assert!(placed[..6].iter().all(|&placed| placed), "{placed:?}");
    swap.free(slots[1], CLUSTER);
    write_back(&mut swap);
    assert_eq!(disk.discarded.lock().unwrap().as_slice(), [], "17 blocks are few");
    let used = swap.stats().disk_bytes;
    swap.free(slots[3], CLUSTER);
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert!(!disk.discarded.lock().unwrap().is_empty());
    assert_eq!(swap.stats().disk_bytes, used - 17 * BLOCK as u64);
    assert_sound(&swap);
    for (seed, &slot) in slots.iter().enumerate().filter(|(seed, _)| ![1, 3].contains(seed)) {
        assert!(fetch(&mut swap, slot, 16).unwrap() == cluster(seed as u64));
        swap.free(slot, CLUSTER);
    }
    write_back(&mut swap);
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert_eq!((swap.books.extents.stale_blocks(), swap.stats().disk_bytes), (0, 0), "the last are few, and all");
    assert_sound(&swap);
}

#[test]
fn a_disk_that_cannot_discard_is_told_once() {
    let disk = Arc::new(Disk { bytes: Mutex::new(vec![0; 600 * BLOCK]), keeps: true, ..Disk::default() });
    let mut swap = store(&disk, tiny());
    let slots: Vec<SwapSlot> = (0..6).map(|seed| put(&mut swap, &cluster(seed))).collect();
    write_back(&mut swap);
    slots.into_iter().for_each(|slot| swap.free(slot, CLUSTER));
    while swap.books.discarding.is_some() {
        next(&mut swap);
    }
    assert!(!swap.discards && swap.stats().disk_bytes == 0);
    assert_sound(&swap);
}

#[test]
fn without_a_file_memory_is_the_limit() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 200 * KIB, ..SwapOptions::default() }).unwrap();
    let slots: Vec<_> = (0..3).map(|seed| swap.put(&cluster(seed)).unwrap()).collect();
    assert_eq!(swap.put(&cluster(3)).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(!swap.complete());
    swap.free(slots[1], CLUSTER);
    let last = swap.put(&cluster(3)).unwrap();
    for (seed, first) in [(0, slots[0]), (2, slots[2]), (3, last)] {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed));
    }
    assert!(swap.stats().compressed_bytes <= 200 * KIB);
}

#[test]
fn a_disk_that_fails_writes_loses_nothing() {
    let disk = Disk::new(1000);
    disk.fail_writes();
    let mut limits = tiny();
    limits.rest = Duration::from_secs(3600);
    let mut swap = store(&disk, limits);
    let mut slots = Vec::new();
    let refusal = loop {
        match swap.put(&cluster(slots.len() as u64)) {
            Ok(first) => slots.push(first),
            Err(error) => break error,
        }
    };
    write_back(&mut swap);
    assert!(refusal.kind() == io::ErrorKind::WouldBlock || refusal.kind() == io::ErrorKind::ResourceBusy);
    let error = swap.put(&cluster(99)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("fails"), "{error}");
    assert_eq!((swap.stats().swap_write_pages, swap.stats().disk_bytes), (0, 0));
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    // It is tried again once it has rested.
    disk.take_writes();
    swap.limits.rest = Duration::ZERO;
    let late = put(&mut swap, &cluster(99));
    write_back(&mut swap);
    assert!(swap.failing.is_none() && swap.stats().swap_write_pages > 0);
    assert!(fetch(&mut swap, late, 16).unwrap() == cluster(99));
}

#[test]
fn a_bad_block_keeps_its_cluster_alone_from_the_disk() {
    let disk = Disk::new(1000);
    disk.bad_writes.lock().unwrap().insert(40);
    let mut swap = store(&disk, tiny());
    let slots: Vec<_> = (0..12).map(|seed| put(&mut swap, &cluster(seed))).collect();
    write_back(&mut swap);
    assert!(swap.stats().swap_write_pages >= 9 * 16);
    for (seed, &first) in slots.iter().enumerate() {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
}

#[test]
fn a_read_error_loses_its_cluster_alone() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 8);
    let bad = swap.books[3].state.place().unwrap();
    disk.bad_reads.lock().unwrap().insert(bad.start + 5);
    for (seed, &first) in slots.iter().enumerate() {
        match fetch(&mut swap, first, 16) {
            Ok(bytes) => assert!(seed != 3 && bytes == cluster(seed as u64)),
            Err(error) => {
                assert_eq!(seed, 3);
                assert!(error.to_string().contains("is bad"), "{error}");
            }
        }
    }
    // What is lost stays so.
    disk.bad_reads.lock().unwrap().clear();
    assert!(fetch(&mut swap, slots[3], 1).is_err());
    swap.free(slots[3], CLUSTER);
    assert_eq!(swap.stats().disk_bytes, 7 * 17 * BLOCK as u64);
}

#[test]
fn what_is_on_its_way_out_is_read_from_memory() {
    let disk = Disk::new(1000);
    disk.hold_writes();
    let mut swap = store(&disk, tiny());
    let slots: Vec<_> = (0..4).map(|seed| swap.put(&cluster(seed)).unwrap()).collect();
    assert!(matches!(swap.books[0].state, ClusterState::Writing { .. }));
    assert_eq!(swap.put(&cluster(9)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let mut buf = vec![0; CLUSTER.bytes() as usize];
    for (seed, &first) in slots.iter().enumerate() {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
        assert!(buf == cluster(seed as u64));
    }
    // Freed meanwhile: the blocks stay taken until the write is over.
    swap.free(slots[0], CLUSTER);
    assert!(matches!(swap.books[0].state, ClusterState::Dropped(_)));
    assert!(swap.stats().disk_bytes > 0);
    assert_sound(&swap);
    disk.let_writes_go();
    write_back(&mut swap);
    slots[1..].iter().for_each(|&first| swap.free(first, CLUSTER));
    write_back(&mut swap);
    assert_eq!((swap.stats().disk_bytes, swap.stats().compressed_bytes), (0, 0));
}

#[test]
fn pages_outlive_their_neighbours() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 2);
    assert!(fetch(&mut swap, slots[0].nth(5), 1).unwrap() == cluster(0)[5 * PAGE_SIZE..6 * PAGE_SIZE]);
    swap.free(slots[0], PageCount(5));
    swap.free(slots[0].nth(6), PageCount(10));
    assert!(fetch(&mut swap, slots[0].nth(5), 1).unwrap() == cluster(0)[5 * PAGE_SIZE..6 * PAGE_SIZE]);
    let error = fetch(&mut swap, slots[0].nth(4), 2).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    swap.free(slots[0].nth(5), PageCount(1));
    assert_eq!(swap.stats().disk_bytes, 17 * BLOCK as u64);
}

#[test]
fn dead_pages_in_memory_take_nothing() {
    let mut swap = store(&Disk::new(100), tiny());
    let first = swap.put(&cluster(1)).unwrap();
    swap.free(first, PageCount(12));
    assert!(swap.stats().compressed_bytes < 17 * KIB);
    assert!(fetch(&mut swap, first.nth(15), 1).unwrap() == cluster(1)[15 * PAGE_SIZE..]);
    assert_sound(&swap);
}

#[test]
fn one_read_serves_all_who_ask() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 1);
    let mut buf = vec![0; PAGE_SIZE];
    for page in 0..16 {
        assert_eq!(swap.get(slots[0].nth(page), &mut buf).unwrap(), Fetch::Coming);
    }
    assert_eq!(swap.books.sums.reads, 1);
    while !next(&mut swap) {}
    for page in 0..16 {
        assert_eq!(swap.get(slots[0].nth(page), &mut buf).unwrap(), Fetch::Here);
    }
    assert_eq!(swap.stats().swap_in_pages, 16);
    assert_eq!(swap.stats().swap_write_pages, 16);
}

/// What is expected is read once, is given without a read, and is a hit when somebody says so; a block that cannot be read
/// is lost to who needs it, not to who expected it.
#[test]
fn what_is_expected_is_here_when_somebody_comes_for_it() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let slots = on_disk(&mut swap, 3);
    let mut buf = vec![0; 16 * PAGE_SIZE];
    assert!(swap.get_expected(slots[0], &mut buf).is_err(), "nobody has expected it");
    let bad = swap.books[1].state.place().unwrap();
    disk.bad_reads.lock().unwrap().insert(bad.start);
    assert_eq!([0, 1, 0].map(|nth| swap.expect(slots[nth], PageCount(16)).0), [16, 16, 0]);
    assert_eq!(swap.get_expected(slots[0], &mut buf).unwrap(), Fetch::Coming);
    write_back(&mut swap);
    assert_eq!(swap.get_expected(slots[0], &mut buf).unwrap(), Fetch::Here);
    assert!(buf == cluster(0) && swap.get_expected(slots[1], &mut buf).is_err());
    assert_eq!((swap.stats().readahead_pages, swap.stats().readahead_hits), (32, 0));
    swap.count_hits(PageCount(16));
    assert_eq!(swap.stats().readahead_hits, 16);
    disk.bad_reads.lock().unwrap().clear();
    assert!(fetch(&mut swap, slots[1], 16).unwrap() == cluster(1));
    assert_sound(&swap);
}

#[test]
fn read_ahead_grows_with_success_and_shrinks_without() {
    let disk = Disk::new(200 * 17);
    let limits = Limits { cache: 1200 * KIB, ..tiny() };
    let mut swap = store(&disk, limits);
    let slots = on_disk(&mut swap, 150);
    assert_eq!(swap.ahead.window(), 1);
    for (seed, &first) in slots.iter().enumerate().take(40) {
        assert!(fetch(&mut swap, first, 16).unwrap() == cluster(seed as u64));
    }
    write_back(&mut swap);
    assert_eq!(swap.ahead.window(), 8);
    let stats = swap.stats();
    assert!(stats.readahead_hits >= 30 * 16 && stats.readahead_pages >= stats.readahead_hits, "{stats:?}");
    // At random, most of it goes unasked for.
    let mut rng = Rng::new(3);
    for _ in 0..60 {
        let index = 45 + rng.below(100) as usize;
        fetch(&mut swap, slots[index], 1).unwrap();
        write_back(&mut swap);
    }
    assert!(swap.ahead.window() <= 2, "{:?}", swap.ahead);
}

#[test]
fn an_idle_disk_gets_the_oldest_ahead() {
    let disk = Disk::new(1000);
    let mut swap = store(&disk, tiny());
    let first = swap.put(&cluster(0)).unwrap();
    assert!(swap.books.sums.idle(), "less than half is no reason to write");
    swap.put(&cluster(1)).unwrap();
    write_back(&mut swap);
    let stats = swap.stats();
    assert_eq!((stats.writeahead_pages, stats.swap_write_pages), (16, 16));
    // Its copy stays as long as there is room, and goes at once when there is not.
    let mut buf = vec![0; PAGE_SIZE];
    assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
    swap.put(&cluster(2)).unwrap();
    assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Coming);
    assert_sound(&swap);
}

#[test]
fn more_may_be_wanted_than_the_cache_holds() {
    let disk = Disk::new(1000);
    let mut limits = tiny();
    limits.cache = 0;
    let mut swap = store(&disk, limits);
    let slots = on_disk(&mut swap, 4);
    let mut buf = vec![0; PAGE_SIZE];
    for &first in &slots {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Coming);
    }
    write_back(&mut swap);
    for &first in &slots {
        assert_eq!(swap.get(first, &mut buf).unwrap(), Fetch::Here);
    }
    assert_eq!(swap.stats().compressed_bytes, 0, "whoever has come needs no copy");
}

#[test]
fn wrong_lengths_and_slots_are_refused() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 1 << 20, ..SwapOptions::default() }).unwrap();
    for len in [0, 100, PAGE_SIZE + 1, 17 * PAGE_SIZE] {
        assert_eq!(swap.put(&vec![1; len]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    let first = swap.put(&[1; PAGE_SIZE]).unwrap();
    for slot in [first.nth(1), SwapSlot(99), SwapSlot(u64::MAX)] {
        assert_eq!(swap.get(slot, &mut [0; PAGE_SIZE]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
#[should_panic(expected = "are in use")]
fn a_slot_is_freed_once() {
    let mut swap = SwapStore::open(SwapOptions { compressed: 1 << 20, ..SwapOptions::default() }).unwrap();
    let first = swap.put(&[1; 2 * PAGE_SIZE]).unwrap();
    swap.free(first, PageCount(1));
    swap.free(first, PageCount(1));
}

#[test]
fn a_file_is_private_locked_and_emptied() {
    let scratch = Scratch::new("file");
    assert_eq!(scratch.open(None).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    fs::write(&scratch.0, b"somebody's").unwrap();
    fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o644)).unwrap();
    let mut swap = scratch.open(Some(1 << 20)).unwrap();
    assert_eq!(scratch.open(None).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let metadata = fs::metadata(&scratch.0).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (1 << 20, 0o600));
    assert_eq!(swap.capacity().disk, 1 << 20);
    on_disk(&mut swap, 2);
    drop(swap);
    assert_eq!(fs::metadata(&scratch.0).unwrap().len(), 0);

    let file = OpenOptions::new().read(true).write(true).open(&scratch.0).unwrap();
    file.set_len(300 * KIB).unwrap();
    let swap = SwapStore::open_file(file, &SwapOptions::default()).unwrap();
    assert_eq!(swap.capacity(), SwapCapacity { memory: 0, disk: 300 * KIB, disk_free: 300 * KIB });
    assert_eq!(scratch.open(Some(1)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(swap);
    assert!(scratch.open(Some(1 << 20)).is_ok());
    let null = SwapOptions { path: Some("/dev/null".into()), size: Some(1 << 20), compressed: 0 };
    assert_eq!(SwapStore::open(null).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
