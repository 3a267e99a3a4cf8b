//! [`interleavings`](crate::interleavings) over a swap in memory.

use crate::interleavings::{Player, run_seeds, seeds};
use crate::swap::Reads;
use crate::world::World;

const LENGTH: usize = 250;

#[test]
fn whatever_happens_between_the_halves_of_freezes_and_dedups() {
    run_seeds(seeds(50_000, LENGTH), LENGTH, |seed, stage, ops| {
        let world = World::new(&stage.layout);
        if seed % 2 == 0 {
            world.swap.borrow_mut().reads = Reads::Later;
        }
        if seed % 4 == 1 {
            world.swap.borrow_mut().size = 30;
        }
        let mut player = Player::new(stage, world);
        ops.iter().for_each(|&op| player.step(op));
        player.end(|_| ());
    });
}
