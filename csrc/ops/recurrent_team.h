// How the directions of a recurrent layer share out torch's threads.
#pragma once

#include "fusewright/recurrent.h"
#include "parallel.h"

namespace fusewright::ops {

// A step of less work than this for every member takes less time than waiting for the others.
constexpr double multiply_adds_per_member = 3e4;

// Two directions of less work than this take less time one after the other than a second thread to come.
constexpr double multiply_adds_per_direction = 3e5;

// Threads that one direction keeps busy, whose steps take `multiply_adds`.
inline int64_t wanted_members(const RecurrentParams& params, double multiply_adds, int64_t threads) {
  const int64_t by_work = static_cast<int64_t>(multiply_adds / multiply_adds_per_member);
  // Fewer units than this for a member leave most lanes empty.
  const int64_t by_units = params.hidden / 16;
  return std::max<int64_t>(1, std::min({threads, by_work, by_units, Team::most_members}));
}

// Calls body(team, member) on up to `members` threads at once.
template <class Body>
void run_team(int64_t members, const Body& body) {
  Team team(members);
  const auto take_part = [&](int64_t, int64_t) {
    const int64_t member = team.join();
    if (member >= 0) body(team, member);
  };
  if (members == 1) return take_part(0, 1);
  torch::stable::parallel_for(0, members, 1, take_part);
}

// Calls first(team, member) and second(team, member), each on up to `members` threads of its own, at once.
template <class First, class Second>
void run_two_teams(int64_t members, const First& first, const Second& second) {
  Team first_team(members), second_team(members);
  const auto join = [](Team& team, const auto& body) {
    const int64_t member = team.join();
    if (member >= 0) body(team, member);
  };
  // A thread that is given numbers of both teams joins the second when the first is done; should that one be closed by
  // then, it did not wait.
  torch::stable::parallel_for(0, 2 * members, 1, [&](int64_t begin, int64_t end) {
    if (begin < members) join(first_team, first);
    if (end > members) join(second_team, second);
  });
}

// Calls body(pass, team, member) for every one of one or two alike passes, whose steps take `multiply_adds` each.
template <class Pass, class Body>
void run_passes(std::vector<Pass>& passes, double multiply_adds, int64_t most_members, const Body& body) {
  const RecurrentParams& params = passes[0].params;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t members = std::min(most_members, wanted_members(params, multiply_adds, threads));
  const auto part_of = [&](Pass& pass) { return [&](Team& team, int64_t member) { body(pass, team, member); }; };
  // Side by side each step waits for half as many threads. Not if that left one of an odd number without work.
  const bool fits = members <= threads / 2 || (threads > 1 && threads % 2 == 0);
  const bool pays = multiply_adds * static_cast<double>(params.steps) >= multiply_adds_per_direction;
  if (passes.size() == 2 && fits && pays) {
    return run_two_teams(std::min(members, threads / 2), part_of(passes[0]), part_of(passes[1]));
  }
  for (Pass& pass : passes) run_team(members, part_of(pass));
}

}  // namespace fusewright::ops
