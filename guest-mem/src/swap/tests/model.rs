//! The store against a map, at random, on disks in all moods.

use super::super::extents::BLOCK;
use super::super::*;
use super::rig::*;
use crate::addr::PAGE_SIZE;

/// What the model knows of a put: the seeds of its pages that are in use.
struct Known {
    first: SwapSlot,
    seeds: Vec<Option<u64>>,
}

impl Known {
    /// A run of pages in use.
    fn run(&self, rng: &mut Rng) -> (usize, usize) {
        let len = self.seeds.len() as u64;
        let start = (0..).map(|_| rng.below(len) as usize).find(|&page| self.seeds[page].is_some()).unwrap();
        let most = self.seeds[start..].iter().take_while(|seed| seed.is_some()).count();
        (start, 1 + rng.below(most as u64) as usize)
    }

    fn bytes(&self, start: usize, count: usize) -> Vec<u8> {
        self.seeds[start..start + count].iter().flat_map(|seed| page(seed.unwrap())).collect()
    }
}

/// Puts, gets, frees and completions at random. Before each step, `weather` may change the disk's mood; at the end the
/// disk must take writes.
fn compare_with_model(seed: u64, mut swap: SwapStore, mut weather: impl FnMut(u64, &mut Rng)) {
    let mut rng = Rng::new(seed);
    let mut model: Vec<Known> = Vec::new();
    let (mut taken, mut refused) = (0, 0);
    for step in 0..2500 {
        weather(step, &mut rng);
        match rng.below(10) {
            0..4 => {
                let seeds: Vec<Option<u64>> = (0..=rng.below(16)).map(|_| Some(rng.bits())).collect();
                let bytes: Vec<u8> = seeds.iter().flatten().flat_map(|&seed| page(seed)).collect();
                let before = swap.stats();
                match swap.put(&bytes) {
                    Ok(first) => {
                        taken += 1;
                        model.push(Known { first, seeds });
                    }
                    Err(error) => {
                        let kinds =
                            [io::ErrorKind::StorageFull, io::ErrorKind::ResourceBusy, io::ErrorKind::WouldBlock];
                        let full = kinds.contains(&error.kind());
                        assert!(full, "{error}");
                        assert_eq!(swap.stats().slots_used, before.slots_used);
                        refused += 1;
                        next_if_busy(&mut swap);
                    }
                }
            }
            4..7 if !model.is_empty() => {
                let known = &model[rng.below(model.len() as u64) as usize];
                let (start, count) = known.run(&mut rng);
                let mut buf = vec![0xaa; count * PAGE_SIZE];
                match swap.get(known.first.nth(start as u64), &mut buf).unwrap() {
                    Fetch::Here => assert!(buf == known.bytes(start, count), "seed {seed}, step {step}"),
                    Fetch::Coming => {}
                }
            }
            7..9 if !model.is_empty() => {
                let index = rng.below(model.len() as u64) as usize;
                let known = &mut model[index];
                let (start, count) = match known.seeds.iter().all(Option::is_some) {
                    true if rng.below(2) == 0 => (0, known.seeds.len()),
                    _ => known.run(&mut rng),
                };
                swap.free(known.first.nth(start as u64), PageCount(count as u64));
                known.seeds[start..start + count].fill(None);
                if known.seeds.iter().all(Option::is_none) {
                    model.swap_remove(index);
                }
            }
            _ => {
                swap.complete();
            }
        }
        assert_sound(&swap);
        let used: usize = model.iter().flat_map(|known| &known.seeds).flatten().count();
        assert_eq!(swap.stats().slots_used, used as u64);
    }
    weather(u64::MAX, &mut rng);
    assert!(taken > 300 && refused > 0, "{taken} puts were taken, {refused} were not");
    assert!(swap.stats().swap_write_pages > 0);
    for known in &model {
        for (index, seed) in known.seeds.iter().enumerate() {
            if let &Some(seed) = seed {
                assert!(fetch(&mut swap, known.first.nth(index as u64), 1).unwrap() == page(seed));
            }
        }
    }
    for known in &model {
        for (index, _) in known.seeds.iter().enumerate().filter(|(_, seed)| seed.is_some()) {
            swap.free(known.first.nth(index as u64), PageCount(1));
        }
    }
    write_back(&mut swap);
    let SwapStats { compressed_bytes, disk_bytes, slots_used, .. } = swap.stats();
    assert_eq!((compressed_bytes, disk_bytes, slots_used), (0, 0, 0));
}

fn next_if_busy(swap: &mut SwapStore) {
    if !swap.books.sums.idle() {
        next(swap);
    }
}

#[test]
fn it_does_what_a_map_does() {
    for seed in 1..=4 {
        compare_with_model(seed, store(&Disk::new(600), tiny()), |_, _| {});
    }
}

#[test]
fn on_a_real_file_too() {
    let scratch = Scratch::new("model");
    let mut swap = scratch.open(Some(600 * BLOCK as u64)).unwrap();
    swap.limits = tiny();
    compare_with_model(5, swap, |_, _| {});
}

#[test]
fn writes_that_fail_now_and_then_lose_nothing() {
    for seed in 6..=9 {
        let disk = Disk::new(600);
        compare_with_model(seed, store(&disk, tiny()), |step, rng| match rng.below(40) {
            _ if step == u64::MAX => disk.take_writes(),
            0 => disk.fail_writes(),
            1 => disk.take_writes(),
            _ => {}
        });
    }
}
