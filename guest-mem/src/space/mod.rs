//! What a VM sees of its guest-physical space, and what its window maps there: [map entries](map::MapEntry) over objects,
//! lists of [runs](crate::ids::Run), and the overlay of a window that maps something else than its stage-2
//! tables say.

pub mod map;
pub(crate) mod overlay;
pub mod runs;
